"""User code: `module:attribute` beside a job file, and the digest of its sources."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import pytest

from batchjob.errors import InvalidJob
from batchjob.user_code import describe_fault, load_target, source_digest


def write_modules(folder: Path, **files: str) -> Path:
    for name, source in files.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder


def load_and_call(target: str, base: Path) -> object:
    return load_target(target, base)()


def test_loads_attributes_and_nested_attributes(tmp_path: Path) -> None:
    base = write_modules(tmp_path, net="class Net:\n    def make():\n        return 'made'\n")
    assert load_target("net:Net.make", base)() == "made"
    assert load_target("net:Net", base) is load_target("net:Net", base)


@pytest.mark.parametrize("source", ["from torch import nn\n", "import torch\nLINEAR = torch.nn.Linear\n"])
def test_a_module_that_hides_an_installed_one_is_named(source: str, tmp_path: Path) -> None:
    base = write_modules(tmp_path, net=source, torch="VERSION = 1\n")
    with pytest.raises(InvalidJob) as caught:
        load_target("net:make", base)
    assert "torch.py hides the installed module torch" in caught.value.message
    assert "_batchjob_folder_" not in caught.value.message


def test_a_hidden_module_is_named_where_a_function_uses_it(tmp_path: Path) -> None:
    base = write_modules(tmp_path, net="import json\ndef make(): return json.loads('1')\n", json="VERSION = 1\n")
    with pytest.raises(AttributeError) as caught:
        load_and_call("net:make", base)
    assert describe_fault(caught.value).startswith(
        "AttributeError: module 'json' has no attribute 'loads' (net.py:2); "
    )
    assert "json.py hides the installed module json" in describe_fault(caught.value)


def test_modules_of_two_folders_never_mix(tmp_path: Path) -> None:
    one = write_modules(tmp_path / "one", net="import other\ndef make(): return other.NAME\n", other="NAME = 'one'\n")
    two = write_modules(tmp_path / "two", net="import other\ndef make(): return other.NAME\n", other="NAME = 'two'\n")
    assert (load_and_call("net:make", one), load_and_call("net:make", two)) == ("one", "two")
    assert "net" not in sys.modules
    assert "other" not in sys.modules
    assert not {str(one), str(two)} & set(sys.path)


def test_every_form_of_sibling_import_works(tmp_path: Path) -> None:
    base = write_modules(
        tmp_path,
        net="""
import pkg.deep
import pkg.deep as alias
from pkg import deep as again, TOP
from pkg.deep import VALUE
from .pkg.deep import VALUE as relative
import json, os.path, importlib.util

def make():
    import late
    assert os.path.join("a", "b") and importlib.util.find_spec
    return [pkg.deep.VALUE, alias.VALUE, again.VALUE, VALUE, relative, TOP, late.VALUE, json.dumps(1)]
""",
        pkg____init__="",
        pkg__deep="from . import near\nimport late\nVALUE = near.VALUE\n",
        pkg__near="VALUE = 7\n",
        late="VALUE = 8\n",
    )
    (base / "pkg" / "__init__.py").write_text("TOP = 6\n")
    assert load_and_call("net:make", base) == [7, 7, 7, 7, 7, 6, 8, "1"]
    assert load_and_call("pkg.deep:near.__str__", base)


def test_module_may_define_dataclasses_and_enums(tmp_path: Path) -> None:
    source = """
from __future__ import annotations
import dataclasses, enum, typing
@dataclasses.dataclass
class Size:
    height: int
    kind: typing.ClassVar[int] = 3
class Kind(enum.Enum):
    A = 1
def make():
    return typing.get_type_hints(Size)["height"], dataclasses.asdict(Size(2)), Kind["A"].value
"""
    assert load_and_call("net:make", write_modules(tmp_path, net=source)) == (int, {"height": 2}, 1)


def test_works_in_a_forkserver_child(tmp_path: Path) -> None:
    base = write_modules(tmp_path, net="import other\ndef make(): return other.NAME\n", other="NAME = 'child'\n")
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        assert pool.apply(load_and_call, ("net:make", base)) == "child"


def test_only_the_job_folder_is_searched(tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=r"json\.py: not there, for 'json:dumps'; there is: net"):
        load_target("json:dumps", write_modules(tmp_path, net=""))


def test_misspelt_module_suggests_a_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match="did you mean 'resnet'"):
        load_target("restnet:make", write_modules(tmp_path, resnet=""))


def test_misspelt_attribute_names_file_and_suggestion(tmp_path: Path) -> None:
    base = write_modules(tmp_path, net="def resnet20(): ...\nclass Other: ...\n")
    with pytest.raises(InvalidJob, match=r"net\.py: has no 'resnet02'.*did you mean 'resnet20'"):
        load_target("net:resnet02", base)
    with pytest.raises(InvalidJob, match=r"there is: Other, resnet20"):
        load_target("net:zzz", base)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import absent_package", r"net\.py:1: does not load: ModuleNotFoundError: No module named 'absent_package'"),
        ("x = 1\ny = x / 0", r"net\.py:2: does not load: ZeroDivisionError"),
        ("def make(:", r"net\.py.*does not load: SyntaxError"),
    ],
)
def test_failing_module_is_reported_with_its_line(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(InvalidJob, match=message):
        load_target("net:make", write_modules(tmp_path, net=source))


def test_absent_folder_and_syntax_error_are_reported(tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match="nothing to choose from"):
        load_target("net:make", tmp_path / "absent")
    with pytest.raises(InvalidJob, match=r"net\.py:1: does not parse"):
        source_digest("net:make", write_modules(tmp_path, net="def make(:"))
    with pytest.raises(InvalidJob, match="not there"):
        source_digest("other:make", tmp_path)


def test_digest_covers_imported_modules_of_the_folder_only(tmp_path: Path) -> None:
    source = "import torch\nfrom pkg import deep\ndef make():\n    import late\n"
    base = write_modules(tmp_path, net=source, pkg__deep="from . import near\n", pkg__near="", late="", stranger="")
    before = source_digest("net:make", base)
    assert source_digest("net:other", base) == before
    (base / "stranger.py").write_text("changed = True\n")
    assert source_digest("net:make", base) == before
    for name in ("pkg/near.py", "late.py", "net.py"):
        with (base / name).open("a") as file:
            file.write("# changed\n")
        after = source_digest("net:make", base)
        assert after != before
        before = after


def test_digest_does_not_depend_on_the_folder_path(tmp_path: Path) -> None:
    files = {"net": "import other\n", "other": "A = 1\n"}
    one, two = write_modules(tmp_path / "one", **files), write_modules(tmp_path / "two", **files)
    assert source_digest("net:make", one) == source_digest("net:make", two)


def test_source_that_may_not_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("x = 1\n")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InvalidJob, match=r"mine.py: cannot be read \(Permission denied\); give this user access"):
        source_digest("mine:x", tmp_path)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import argparse\nargparse.ArgumentParser().parse_args(['--lr'])\n", "net.py:2: does not load: SystemExit: 2"),
        ("import sys\nif True:\n    sys.exit('no licence')\n", "net.py:3: does not load: SystemExit: no licence"),
        ("exit()\n", "net.py:1: does not load: SystemExit"),
    ],
)
def test_exit_at_import_is_an_invalid_job_with_its_line(tmp_path: Path, source: str, words: str) -> None:
    (tmp_path / "net.py").write_text(source)
    with pytest.raises(InvalidJob) as caught:
        load_target("net:build", tmp_path)
    assert words in caught.value.message
    assert "below `if __name__ == '__main__':`" in caught.value.message


@pytest.mark.filterwarnings("ignore")
def test_fault_of_torchscript_is_its_cause() -> None:
    import torch

    module = torch.jit.trace(torch.nn.Linear(3, 2), torch.rand(1, 3))
    with pytest.raises(RuntimeError) as caught:
        module(torch.rand(1, 4))
    told = describe_fault(caught.value)
    assert told.startswith("RuntimeError: ")
    assert told.endswith("mat1 and mat2 shapes cannot be multiplied (1x4 and 3x2)")
    assert len(told) < 100


def test_keyboard_interrupt_in_user_code_passes(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_target("net:build", tmp_path)


def test_fault_names_the_innermost_line_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / "__init__.py").touch()
    (tmp_path / "blocks" / "stem.py").write_text("import json\n\ndef parse(text):\n    return json.loads(text)\n")
    (tmp_path / "net.py").write_text("from blocks.stem import parse\n\ndef build():\n    return parse('{')\n")
    with pytest.raises(ValueError, match="Expecting property name") as caught:
        load_target("net:build", tmp_path)()
    assert describe_fault(caught.value).endswith("(blocks/stem.py:4)")
    assert describe_fault(ValueError("made here")) == "ValueError: made here"
