"""`type: huggingface`: a transformers model from a folder or the Hub, for classification, detection or features."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ValidationInfo, ValidatorFunctionWrapHandler, WrapValidator

from batchjob.errors import InvalidJob
from batchjob.models.checkpoint_tensors import list_names
from batchjob.models.class_layers import find_huggingface_layers
from batchjob.models.huggingface_files import ModelFiles, download_from_hub, list_model_files, local_copy
from batchjob.models.huggingface_hub import hub_offline, silence_hub_libraries
from batchjob.models.huggingface_preprocessing import convert_image_processor
from batchjob.models.loaded_model import LoadedModel, isolated_torch_state, prepare_for_inference
from batchjob.models.output_selection import OutputSelection, select_output
from batchjob.models.trusted_file import WeightsFile
from batchjob.preprocessing.settings import Preprocess
from batchjob.settings import CommandLineText, Uri
from batchjob.system import require_packages, working_directory
from batchjob.uris import is_local

if TYPE_CHECKING:
    import torch
    from torch import nn

    from batchjob.storage.reader import Reader

__all__ = ["HuggingfaceModel"]

_log = logging.getLogger(__name__)
_HUB_NAME = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
# Weights that features of images, and classes, can do without: of the text tower of a model of images and text, and
# constants, masks and poolers that other versions of transformers saved, too.
_TEXT_KEY = re.compile(r"text_|logit_(scale|bias)")
_UNUSED_KEY = re.compile(
    r"^text_|^logit_(scale|bias)|(^|\.)pooler\.|(^|\.)(position_ids|mask_token|relative_position_index|num_batches_tracked)$"
)
_AUTO_CLASSES = {
    "classification": "AutoModelForImageClassification",
    "detection": "AutoModelForObjectDetection",
    "features": "AutoModel",
}

ModelKind = Literal["classification", "detection", "features"]


def _resolve_unless_on_hub(value: Any, resolve: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
    # A folder beside the job file has precedence over a name on the Hub, as in transformers.
    if not isinstance(value, str) or value.startswith(".") or not _HUB_NAME.match(value):
        return resolve(value)
    context = None if isinstance(value, CommandLineText) else info.context
    folder = Path(context["base"]) if context else working_directory()
    return resolve(value) if (folder / value).is_dir() else str(value)


class HuggingfaceModel(WeightsFile, OutputSelection):
    """Model of transformers. It brings its preprocessing and its labels. Code in its folder is never run.

    Attributes:
        model: Local path or URI of a folder written by `save_pretrained`, or a name on the Hugging Face Hub. Only JSON
            and weights are read. `sha256` is that of the weights; for several files, of their contents in the order of
            their names.
        kind: Use of the model: `classification` returns logits `[n, classes]`; `detection` a dict of `logits`
            `[n, queries, classes]` and `pred_boxes` `[n, queries, 4]` (centre, width and height, as fractions of the
            input); `features` a vector `[n, d]`: the model's pooled output, else the class token, else the mean of all
            tokens or positions. `auto` chooses by the architecture that the model was saved as.
        revision: Branch, tag or commit of a model on the Hub; null for its default branch.
    """

    type: Literal["huggingface"] = "huggingface"
    model: Annotated[Uri, WrapValidator(_resolve_unless_on_hub)]
    kind: Literal["auto", "classification", "detection", "features"] = "auto"
    revision: str | None = None

    @property
    def title(self) -> str:
        """Name in the column `model_id`, before the digest."""
        return self.model.rstrip("/") if self._is_on_hub else self.model.rstrip("/").rpartition("/")[2]

    def check(self, reader: Reader, folder: Path) -> None:  # noqa: ARG002 - all formats share this signature
        """Check, without torch, that transformers is installed and that a local folder holds a model.

        Raises:
            InvalidJob: One of these is not so.
            Unavailable: The store cannot be reached.
        """
        require_packages("transformers", model_type="huggingface", extra="hf")
        if not self._is_on_hub:
            self._choose_kind(list_model_files(reader, self.model))

    def list_files(self, reader: Reader, folder: Path) -> list[str]:  # noqa: ARG002
        """Return the URIs of weights and configuration; none for a model on the Hub."""
        if self._is_on_hub:
            return []
        files = list_model_files(reader, self.model)
        return [files.folder + name for name in (*files.weights, *files.other_files)]

    def load(self, reader: Reader, folder: Path) -> LoadedModel:  # noqa: ARG002
        """Build the model and load its weights.

        Raises:
            InvalidJob: transformers is not installed; there is no such model; it is of another kind or needs code of
                its own; or its weights are incomplete or have another digest.
            Unavailable: The store or the Hub cannot be reached.
        """
        require_packages("transformers", model_type="huggingface", extra="hf")
        with silence_hub_libraries():
            import transformers  # noqa: F401 - imported here so that its progress bars are silenced below
        model_folder = download_from_hub(self.model, self.revision) if self._is_on_hub else self.model
        files = list_model_files(reader, model_folder)
        kind = self._choose_kind(files)
        with (
            local_copy(reader, files) as (local_folder, files_digest, weights_digest),
            hub_offline(),
            silence_hub_libraries(),
            isolated_torch_state(),
        ):
            self._check_digest(weights_digest, files)
            model, is_pooler_trained = self._load_pretrained(local_folder, files, kind)
            preprocess = self._load_preprocess(local_folder, files)
        # Earlier versions dropped the projection: none of their plans goes on with other features.
        projected = kind == "features" and _finds_projection(files)
        digest = hashlib.sha256(f"{files_digest} projected".encode()).hexdigest() if projected else files_digest
        module = _make_module(model, kind, is_pooler_trained, self._where)
        module = prepare_for_inference(module, "model.model")
        labels = None if kind == "features" else _find_labels(model.config)
        is_classifier = kind == "classification" and self.output is None
        return LoadedModel(
            select_output(module, self.output),
            preprocess,
            labels,
            digest,
            class_layers=tuple(f"model.{name}" for name in find_huggingface_layers(model)) if is_classifier else (),
            gives_features=f"{type(model).__name__} has no classification head" if kind == "features" else None,
        )

    @property
    def _is_on_hub(self) -> bool:
        return is_local(self.model) and not self.model.startswith(("file://", os.sep))

    @property
    def _where(self) -> str:
        return f"model.model: {self.model}"

    def _choose_kind(self, files: ModelFiles) -> ModelKind:
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
        # Another head, such as ViTForMaskedImageModeling. A name without one, such as ViTModel, is a bare body.
        if re.search(r"[A-Za-z0-9]For[A-Z]", architecture):
            raise InvalidJob(
                f"{self._where} is a {architecture}, neither for classification nor for detection; "
                "write model.kind: features to use what it sees"
            )
        return "features"

    def _check_digest(self, digest: str, files: ModelFiles) -> None:
        if self.sha256 not in {None, digest}:
            raise InvalidJob(
                f"{self._where}: {' and '.join(files.weights)} has the sha256 {digest}, but model.sha256 is "
                f"{self.sha256}; it is not the model you meant, or model.sha256 must be corrected"
            )

    def _load_pretrained(self, folder: Path, files: ModelFiles, kind: ModelKind) -> tuple[Any, bool]:
        """Load the model, and tell if its pooled output was trained."""
        import torch
        import transformers

        class_name = _AUTO_CLASSES[kind]
        if kind == "features" and _finds_projection(files):
            class_name = files.config["architectures"][0]  # AutoModel would load the body alone.
        auto_class: Any = getattr(transformers, class_name)
        try:
            model, info = auto_class.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                weights_only=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except (MemoryError, InvalidJob):
            raise
        except Exception as error:  # Anything in the folder may be wrong, from JSON to tensors.
            raise InvalidJob(f"{self._where} {self._explain_load_error(error, files, kind)}") from error
        return model, self._check_loading_info(model, info, files, kind)

    def _check_loading_info(self, model: Any, info: Mapping[str, Any], files: ModelFiles, kind: ModelKind) -> bool:
        """Refuse missing and left-over weights; return False if the pooler is missing, which features can do without.

        transformers fills missing weights with random numbers, and drops those that its class does not use.
        """
        missing = sorted(map(str, info["missing_keys"]))
        pooler = [key for key in missing if kind == "features" and key.split(".")[0] == "pooler"]
        # Features of images do not need the text tower of a model of images and text.
        text = [key for key in missing if hasattr(model, "get_image_features") and _TEXT_KEY.match(key)]
        needed = [key for key in missing if key not in pooler and (kind != "features" or key not in text)]
        architecture = next(iter(files.config.get("architectures") or ()), "something else")
        if needed:
            raise InvalidJob(
                f"{self._where} was saved as {architecture} and has no weights for {list_names(needed)}; correct "
                f"model.kind (it is {kind}), or save the whole model"
            )
        # Whoever asks for the features of a model with a head does without the head.
        if kind == "features" and self.kind == "features" and type(model).__name__ != architecture:
            return not pooler
        unused = [key for key in sorted(map(str, info["unexpected_keys"])) if not _UNUSED_KEY.search(key)]
        if unused:
            raise InvalidJob(
                f"{self._where} was saved as {architecture} and holds weights that {type(model).__name__} does not "
                f"use: {list_names(unused)}; correct model.kind (it is {kind}), or build the model with model.type: "
                "python"
            )
        return not pooler

    def _explain_load_error(self, error: Exception, files: ModelFiles, kind: ModelKind) -> str:
        text = " ".join(str(error).split())
        model_type = files.config.get("model_type")
        if "trust_remote_code" in text or ("auto_map" in files.config and isinstance(error, ValueError | KeyError)):
            return "needs code of its own, which is never run; build it with model.type: python"
        if "Unrecognized configuration class" in text:
            return f"is a {model_type}, which transformers has not for {kind}; correct model.kind"
        if "does not recognize this architecture" in text or "Unrecognized model" in text:
            return f"is a {model_type}, which this version of transformers does not know; pip install -U transformers"
        return f"cannot be loaded ({type(error).__name__}: {text[:300]}); save it again with model.save_pretrained()"

    def _load_preprocess(self, folder: Path, files: ModelFiles) -> Preprocess | None:
        import transformers

        auto_class: Any = transformers.AutoImageProcessor
        if not set(files.other_files) - {"config.json"}:
            return None
        try:
            processor = auto_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # noqa: BLE001 - the job may state all of its preprocessing itself
            _log.warning("%s: its image processor cannot be loaded (%s)", self._where, error)
            return None
        return convert_image_processor(processor, self._where)


def _finds_projection(files: ModelFiles) -> bool:
    """Check if the model was saved as a vision tower with its projection, such as `CLIPVisionModelWithProjection`."""
    import transformers

    architecture = next(iter(files.config.get("architectures") or ()), "")
    model_class = getattr(transformers, str(architecture), None) if "ModelWithProjection" in architecture else None
    return getattr(model_class, "main_input_name", None) == "pixel_values"


def _find_labels(config: Any) -> tuple[str, ...] | None:
    """Find labels by class id; None if they are the placeholders that transformers generates."""
    id2label: Mapping[Any, Any] = getattr(config, "id2label", None) or {}
    labels = {int(key): str(label) for key, label in id2label.items()}
    if not labels or all(label == f"LABEL_{key}" for key, label in labels.items()):
        return None
    return tuple(labels.get(key, "N/A") for key in range(max(labels) + 1))


def _make_module(model: Any, kind: ModelKind, is_pooler_trained: bool, where: str) -> nn.Module:
    """Wrap a model in a module from pixels to the outputs that tasks of this kind expect."""
    import torch

    class TransformersModule(torch.nn.Module):
        """Module from pixels `[n, c, h, w]` to a tensor, or to a dict of tensors for detection."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: torch.Tensor) -> Any:
            if kind == "features":
                return compute_features(self.model, pixels)
            outputs = self.model(pixel_values=pixels, return_dict=True)
            if kind == "classification":
                return outputs.logits
            return {key: outputs[key] for key in ("logits", "pred_boxes")}

    compute_features = _make_feature_function(model, is_pooler_trained, where)
    return TransformersModule().eval()


def _make_feature_function(
    model: Any, is_pooler_trained: bool, where: str
) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    parameter_names = {name.rpartition(".")[2] for name in model.state_dict()}
    has_class_token = bool(parameter_names & {"cls_token", "class_embedding"})

    def compute_features(body: Any, pixels: torch.Tensor) -> torch.Tensor:
        # Models of images and text (CLIP, SigLIP) have a method for images alone.
        forward = getattr(body, "get_image_features", body)
        outputs = forward(pixel_values=pixels)
        projected = getattr(outputs, "image_embeds", None)
        if projected is not None:
            return projected.flatten(1)  # type: ignore[no-any-return]
        pooled = getattr(outputs, "pooler_output", None)
        if is_pooler_trained and pooled is not None:
            return pooled.flatten(1)  # type: ignore[no-any-return]
        tokens = getattr(outputs, "last_hidden_state", None)
        if tokens is None:
            raise InvalidJob(f"{where} gives no features: neither pooler_output nor last_hidden_state")
        if tokens.ndim == 4:  # [n, d, h, w], of a convolutional network
            return tokens.mean((2, 3))  # type: ignore[no-any-return]
        return tokens[:, 0] if has_class_token else tokens.mean(1)  # type: ignore[no-any-return]

    return compute_features
