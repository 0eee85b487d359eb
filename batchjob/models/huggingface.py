"""`type: huggingface`: a model of transformers from a folder or the Hub, for classes, boxes or features."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ValidationInfo, ValidatorFunctionWrapHandler, WrapValidator

from batchjob.errors import InvalidJob
from batchjob.models.architecture import isolated_torch_state, prepare_for_inference
from batchjob.models.huggingface_files import ModelFiles, download_from_hub, list_model_files, local_copy
from batchjob.models.huggingface_hub import hub_offline, silence_hub_libraries
from batchjob.models.huggingface_preprocessing import convert_image_processor
from batchjob.models.loaded_model import LoadedModel
from batchjob.models.output_selection import OutputSelection, select_output
from batchjob.models.trusted_file import WeightsFile
from batchjob.settings import CommandLineText, Uri, is_local
from batchjob.system import require_packages

if TYPE_CHECKING:
    import torch
    from torch import nn

    from batchjob.preprocessing.settings import Preprocess
    from batchjob.storage.reader import Reader

__all__ = ["HuggingfaceModel"]

_log = logging.getLogger(__name__)
_HUB = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_CLASSES = {
    "classification": "AutoModelForImageClassification",
    "detection": "AutoModelForObjectDetection",
    "features": "AutoModel",
}
ModelKind = Literal["classification", "detection", "features"]


def _hub_or_uri(value: Any, resolve: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
    """A folder beside the job file goes before a name of the Hub, as in transformers."""
    if not isinstance(value, str) or value.startswith(".") or not _HUB.match(value):
        return resolve(value)
    given = None if isinstance(value, CommandLineText) else info.context
    base = Path(given["base"]) if given else Path.cwd()
    return resolve(value) if (base / value).is_dir() else str(value)


class HuggingfaceModel(WeightsFile, OutputSelection):
    """A model of transformers. It brings its preprocessing and its labels; code of its own is never run.

    Attributes:
        model: a folder that `save_pretrained` has written, wherever it lies, or a name on the Hugging Face Hub. Of
            the folder only JSON and weights are read; `sha256` is that of the weights, of several files one after
            the other in the order of their names.
        kind: what it is for: `classification` gives logits `[n, classes]`, `detection` a dict of `logits`
            `[n, queries, classes]` and `pred_boxes` `[n, queries, 4]` (centre, width and height, as shares of the
            input), `features` a vector `[n, d]`: the model's pooled output, else the class token, else the mean of
            all tokens or places. `auto` goes by the architecture that the model was saved as.
        revision: branch, tag or commit, of a model on the Hub.
    """

    type: Literal["huggingface"] = "huggingface"
    model: Annotated[Uri, WrapValidator(_hub_or_uri)]
    kind: Literal["auto", "classification", "detection", "features"] = "auto"
    revision: str | None = None

    @property
    def title(self) -> str:
        """What `model_id` calls it, before the digest."""
        return self.model.rstrip("/") if self._on_hub else self.model.rstrip("/").rpartition("/")[2]

    def check(self, reader: Reader, base: Path) -> None:  # noqa: ARG002 - one face for all formats
        """Looks without torch whether transformers and the folder are there. Raises InvalidJob, Unavailable."""
        require_packages("huggingface", "hf", "transformers")
        if not self._on_hub:
            self._kind(list_model_files(reader, self.model))

    def load(self, reader: Reader, base: Path) -> LoadedModel:  # noqa: ARG002
        """Builds and fills the model.

        Raises:
            InvalidJob: no transformers, no such model, one for another kind of task, one that needs code of its own,
                or weights that are not whole.
            Unavailable: store or Hub cannot be reached.
        """
        require_packages("huggingface", "hf", "transformers")
        with silence_hub_libraries():
            import transformers  # noqa: F401 - now, so that its progress bars are silenced below
        files = list_model_files(reader, download_from_hub(self.model, self.revision) if self._on_hub else self.model)
        kind = self._kind(files)
        with (
            local_copy(reader, files) as (folder, digest, weights),
            hub_offline(),
            silence_hub_libraries(),
            isolated_torch_state(),
        ):
            self._check_digest(weights, files)
            model, pooled = self._filled(folder, files, kind)
            preprocess = self._preprocess(folder, files)
        module = prepare_for_inference(_wrapped(model, kind, pooled, self._where), "model.model")
        labels = None if kind == "features" else _labels(model.config)
        return LoadedModel(select_output(module, self.output), preprocess, labels, digest)

    @property
    def _on_hub(self) -> bool:
        return is_local(self.model) and not self.model.startswith(("file://", os.sep))

    @property
    def _where(self) -> str:
        return f"model.model: {self.model}"

    def _kind(self, files: ModelFiles) -> ModelKind:
        if self.kind != "auto":
            return self.kind
        architecture = next(iter(files.config.get("architectures") or ()), None)
        if architecture is None:
            raise InvalidJob(
                f"{self._where} does not say what it was saved as; write model.kind: classification, detection "
                "or features"
            )
        if "ForImageClassification" in architecture:
            return "classification"
        if "ForObjectDetection" in architecture:
            return "detection"
        if re.search(r"[A-Za-z0-9]For[A-Z]", architecture):
            raise InvalidJob(
                f"{self._where} is a {architecture}, neither for classification nor for detection; "
                "write model.kind: features to use what it sees"
            )
        return "features"

    def _check_digest(self, weights: str, files: ModelFiles) -> None:
        if self.sha256 not in {None, weights}:
            raise InvalidJob(
                f"{self._where}: {' and '.join(files.weights)} has the sha256 {weights}, but model.sha256 is "
                f"{self.sha256}; it is not the model you meant, or model.sha256 must be corrected"
            )

    def _filled(self, folder: Path, files: ModelFiles, kind: ModelKind) -> tuple[Any, bool]:
        """The model, and whether its pooled output was trained."""
        import torch
        import transformers

        loader: Any = getattr(transformers, _CLASSES[kind])
        try:
            model, info = loader.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                weights_only=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except (MemoryError, InvalidJob):
            raise
        except Exception as error:  # whatever does not fit: from JSON to tensors
            raise InvalidJob(f"{self._where} {self._diagnosed(error, files, kind)}") from error
        missing = sorted(map(str, info["missing_keys"]))
        pooler = [key for key in missing if kind == "features" and key.split(".")[0] == "pooler"]
        if len(missing) > len(pooler):
            listed = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
            saved = next(iter(files.config.get("architectures") or ()), "something else")
            raise InvalidJob(
                f"{self._where} was saved as {saved} and has no weights for {listed}; correct model.kind (it is "
                f"{kind}), or save the whole model"
            )
        return model, not pooler

    def _diagnosed(self, error: Exception, files: ModelFiles, kind: ModelKind) -> str:
        text = " ".join(str(error).split())
        name = files.config.get("model_type")
        if "trust_remote_code" in text or ("auto_map" in files.config and isinstance(error, ValueError | KeyError)):
            return "needs code of its own, which is never run; build it with model.type: python"
        if "Unrecognized configuration class" in text:
            return f"is a {name}, which transformers has not for {kind}; correct model.kind"
        if "does not recognize this architecture" in text or "Unrecognized model" in text:
            return f"is a {name}, which this version of transformers does not know; pip install -U transformers"
        return f"cannot be loaded ({type(error).__name__}: {text[:300]}); save it again with model.save_pretrained()"

    def _preprocess(self, folder: Path, files: ModelFiles) -> Preprocess | None:
        import transformers

        loader: Any = transformers.AutoImageProcessor
        if not set(files.other_files) - {"config.json"}:
            return None
        try:
            found = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # noqa: BLE001 - the job may say all of it itself
            _log.warning("%s: its image processor cannot be loaded (%s)", self._where, error)
            return None
        return convert_image_processor(found, self._where)


def _labels(config: Any) -> tuple[str, ...] | None:
    """Names by id, unless they are those that transformers makes up."""
    names: Mapping[Any, Any] = getattr(config, "id2label", None) or {}
    by_id = {int(key): str(name) for key, name in names.items()}
    if not by_id or all(name == f"LABEL_{key}" for key, name in by_id.items()):
        return None
    return tuple(by_id.get(key, "N/A") for key in range(max(by_id) + 1))


def _wrapped(model: Any, kind: ModelKind, pooled: bool, where: str) -> nn.Module:
    """The model as a function from pixels to what its kind of task wants."""
    import torch

    class TransformersModel(torch.nn.Module):
        """Takes pixels `[n, c, h, w]`; gives plain tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: torch.Tensor) -> Any:
            if kind == "features":
                return features(self.model, pixels)
            found = self.model(pixel_values=pixels, return_dict=True)
            return found.logits if kind == "classification" else {key: found[key] for key in ("logits", "pred_boxes")}

    features = _features(model, pooled, where)
    return TransformersModel().eval()


def _features(model: Any, pooled: bool, where: str) -> Any:
    has_class_token = any(name.rpartition(".")[2] in {"cls_token", "class_embedding"} for name in model.state_dict())

    def features(body: Any, pixels: torch.Tensor) -> torch.Tensor:
        # Models of images and text (CLIP, SigLIP) have a function for their one half.
        run = getattr(body, "get_image_features", body)
        found = run(pixel_values=pixels)
        vector = getattr(found, "pooler_output", None)
        if pooled and vector is not None:
            return vector.flatten(1)  # type: ignore[no-any-return]
        tokens = getattr(found, "last_hidden_state", None)
        if tokens is None:
            raise InvalidJob(f"{where} gives no features: neither pooler_output nor last_hidden_state")
        if tokens.ndim == 4:
            return tokens.mean((2, 3))  # type: ignore[no-any-return]
        return tokens[:, 0] if has_class_token else tokens.mean(1)  # type: ignore[no-any-return]

    return features
