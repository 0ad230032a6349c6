import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cptool
from cptool.ops import extension
from cptool.ops.attention import _C
from cptool.ops.kernels import build_info, cpu_isas

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = Path(_C.__file__)


def test_the_extension_says_what_it_is():
    assert _C.version == cptool.__version__
    info = build_info()
    assert info["compiler"]
    assert set(cpu_isas()) <= set(info["isas"])
    assert isinstance(info["cuda_archs"], list) and isinstance(info["watchdog"], bool)


def test_the_version_has_one_source():
    try:
        installed = importlib.metadata.version("cptool")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("cptool is not installed: the extension was built in place")
    assert installed == cptool.__version__


def test_the_extension_needs_neither_torch_nor_a_driver():
    """Its dynamic section names libraries of the system and of the compiler alone."""
    section = subprocess.run(
        ["readelf", "-d", EXTENSION], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", section)
    assert needed and all(
        re.match(r"(lib(stdc\+\+|m|gcc_s|c|dl|rt|pthread)|ld-linux.*)\.so", name) for name in needed
    ), needed
    code = (
        "import sys; from cptool.ops import extension\n"
        "extension.load(); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kernels_beyond_the_baseline_export_no_shared_function():
    """A weak one could replace the baseline's copy on machines that lack its instructions."""
    objects = [
        path
        for isa in build_info()["isas"][1:]
        for path in ROOT.glob(f"build/temp*/cmake/CMakeFiles/_C.dir/csrc/cpu/{isa}.cpp.o")
    ]
    if not objects:
        pytest.skip("no object files: the extension was not built in this checkout")
    for path in objects:
        symbols = subprocess.run(
            ["nm", "-C", path], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert [line for line in symbols if re.search(r" [Wwu] ", line)] == []


def test_source_hash(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "a.h").write_text("one")
    (tmp_path / "cpu" / "b.cpp").write_text("two")
    hashes = [extension.source_hash(tmp_path)]
    (tmp_path / "notes.txt").write_text("not a source")
    assert extension.source_hash(tmp_path) == hashes[0]
    (tmp_path / "cpu" / "b.cpp").write_text("three")
    hashes.append(extension.source_hash(tmp_path))
    (tmp_path / "cpu" / "b.cpp").rename(tmp_path / "b.cpp")
    hashes.append(extension.source_hash(tmp_path))
    (tmp_path / "c.cu").write_text("")
    hashes.append(extension.source_hash(tmp_path))
    assert len(set(hashes)) == 4


@pytest.fixture
def checkout(tmp_path):
    """A checkout with the package's bare bones and the sources, nothing built."""
    root = tmp_path / "checkout"
    (root / "cptool" / "ops").mkdir(parents=True)
    for name in ("__init__.py", "ops/__init__.py", "ops/extension.py"):
        shutil.copy(ROOT / "cptool" / name, root / "cptool" / name)
    shutil.copytree(ROOT / "csrc", root / "csrc")
    return root


def load_in(checkout, *search):
    """Where the checkout's package finds its extension, or the last line of its complaint.

    `search`: further import roots."""
    code = (
        f"import sys; sys.path[:0] = {[str(checkout), *map(str, search)]}\n"
        "from cptool.ops import extension; print(extension.load().__file__)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    return (done.stdout or done.stderr).strip().splitlines()[-1]


def install(site, version=cptool.__version__):
    """What `pip install .` leaves in a site directory, as far as the loader looks."""
    (site / "cptool").mkdir(parents=True)
    shutil.copy(EXTENSION, site / "cptool")
    info = site / f"cptool-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: cptool\nVersion: {version}\n")
    (info / "RECORD").write_text(f"cptool/__init__.py,,\ncptool/{EXTENSION.name},,\n")


def test_an_extension_beside_the_package_is_taken(checkout, tmp_path):
    install(tmp_path / "site")
    shutil.copy(EXTENSION, checkout / "cptool")
    assert load_in(checkout, tmp_path / "site") == str(checkout / "cptool" / EXTENSION.name)


def test_a_checkout_takes_the_installed_extension(checkout, tmp_path):
    """`torchrun -m cptool` in a checkout after `pip install .` imports the checkout's package."""
    install(tmp_path / "site")
    assert load_in(checkout, tmp_path / "site") == str(
        tmp_path / "site" / "cptool" / EXTENSION.name
    )


def test_a_stale_extension_in_place_yields_to_a_fresh_installed_one(checkout, tmp_path):
    """`pip install .` mends a checkout in which an old extension was left."""
    shutil.copy(EXTENSION, checkout / "cptool")
    stale = checkout / "cptool" / EXTENSION.name
    built = stale.read_bytes()
    assert _C.source_hash.encode() in built
    stale.write_bytes(built.replace(_C.source_hash.encode(), b"0" * 64))
    install(tmp_path / "site")
    assert load_in(checkout, tmp_path / "site") == str(
        tmp_path / "site" / "cptool" / EXTENSION.name
    )


def test_a_missing_extension_is_named(monkeypatch):
    monkeypatch.setattr(extension, "_candidates", lambda package: [package / "_C.so"])
    with pytest.raises(
        ImportError,
        match=r"^cptool's compiled extension is missing beside .*; build it with `pip install \.`",
    ):
        extension.load()


@pytest.mark.parametrize("where", ["beside", "installed"])
def test_an_extension_of_other_sources_is_refused(checkout, tmp_path, where):
    if where == "beside":
        shutil.copy(EXTENSION, checkout / "cptool")
    else:
        install(tmp_path / "site")
    (checkout / "csrc" / "attention.h").write_text("// changed\n")
    message = load_in(checkout, tmp_path / "site")
    assert message.startswith("ImportError: cptool's compiled extension ")
    assert (
        f"was not built from the sources in {checkout / 'csrc'}; build it with `pip install .`"
        in message
    )


def test_an_extension_of_another_version_is_refused(checkout):
    shutil.copy(EXTENSION, checkout / "cptool")
    (checkout / "cptool" / "__init__.py").write_text('__version__ = "9.9.9"\n')
    message = load_in(checkout)
    assert message.startswith("ImportError: cptool is version 9.9.9, its compiled extension ")
    assert f" is {cptool.__version__}; build it with" in message


@pytest.mark.parametrize(
    "setting, message",
    [
        ("maybe", "CPTOOL_CUDA is 'maybe'; it must be auto, on or off"),
        ("on", "CPTOOL_CUDA is 'on', but no working nvcc was found"),
    ],
)
def test_cuda_setting(tmp_path, setting, message):
    if shutil.which("cmake") is None:
        pytest.skip("no cmake outside the isolated build")
    command = [
        "cmake",
        "-S",
        ROOT,
        "-B",
        tmp_path,
        f"-DCPTOOL_CUDA={setting}",
        "-DCMAKE_CUDA_COMPILER=NOTFOUND",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "CUDACXX": "/nonexistent"},
    )
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())
