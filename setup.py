"""Everything is said in pyproject.toml; the CUDA part is built from here, without torch.

Where nvcc is found the module uniflow_kernels._cuda is built from csrc/, else it is left out: the package works without
it. Environment variables: UNIFLOW_CUDA=1 insists on it, UNIFLOW_CUDA=0 leaves it out; UNIFLOW_CUDA_ARCHS lists the
architectures ("80;90", "90a"), by default those of 80, 90 and 100 that nvcc knows, with PTX of the last one for later
GPUs; CUDA_HOME says where nvcc is.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
ARCHS = ["80", "90", "100"]
WITHOUT = "To install without the CUDA part, which is optional, say UNIFLOW_CUDA=0."

# one rule for host and device code: nvcc hands .cpp files on to the host's compiler
NINJA = """\
flags = -std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden -cudart static {includes}
rule compile
  command = {nvcc} $flags $archs -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {nvcc} -shared -cudart static $in -o $out
{objects}
build {target}: link {names}
"""


def find_nvcc() -> str | None:
    """The compiler of CUDA_HOME, else that on the PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def is_wanted() -> bool:
    """Whether to build the CUDA part."""
    wish = os.environ.get("UNIFLOW_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"UNIFLOW_CUDA: expected 0 or 1, got {wish!r}")
    if wish == "1" and find_nvcc() is None:
        sys.exit(f"UNIFLOW_CUDA=1, but there is no nvcc on the PATH or under CUDA_HOME. {WITHOUT}")
    return wish != "0" and find_nvcc() is not None


def known_archs() -> list[str]:
    """Those of ARCHS that nvcc compiles for; all of them where it does not say."""
    done = subprocess.run([find_nvcc(), "--list-gpu-arch"], capture_output=True, text=True, check=False)
    listed = re.findall(r"^compute_(\d+)$", done.stdout, re.MULTILINE)
    return [arch for arch in ARCHS if arch in listed] if listed else ARCHS


def arch_flags() -> str:
    """nvcc's options for the architectures."""
    wish = os.environ.get("UNIFLOW_CUDA_ARCHS")
    archs = known_archs() if wish is None else [arch for arch in re.split(r"[;, ]+", wish) if arch]
    wrong = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch)]
    if wrong or (not archs and wish is not None):
        sys.exit(f'UNIFLOW_CUDA_ARCHS: expected a list such as "80;90;100", got {wish!r}')
    if not archs:
        wanted = ", ".join(f"sm_{arch}" for arch in ARCHS)
        sys.exit(f"{find_nvcc()} compiles for none of {wanted}: a newer CUDA toolkit is needed. {WITHOUT}")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return " ".join([*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"])


def pybind11_headers() -> str:
    """Those of the package, else the copy that torch carries, which is found without importing torch."""
    package, torch = importlib.util.find_spec("pybind11"), importlib.util.find_spec("torch")
    if package is not None and package.origin:
        return str(Path(package.origin).parent / "include")
    carried = Path(torch.origin).parent / "include" if torch is not None and torch.origin else ROOT
    if not (carried / "pybind11").is_dir():
        sys.exit(f"The CUDA part needs pybind11 to be built: pip install pybind11 ninja. {WITHOUT}")
    return str(carried)


def find_ninja() -> str:
    """The program of the package, else the one on the PATH."""
    package = importlib.util.find_spec("ninja")
    if shutil.which("ninja") is None and package is None:
        sys.exit(f"The CUDA part needs ninja to be built: pip install pybind11 ninja. {WITHOUT}")
    if package is None:
        return str(shutil.which("ninja"))
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


class BuildCuda(build_ext):
    """Builds the CUDA part with ninja."""

    def build_extension(self, extension: Extension) -> None:
        """Write the rules for ninja and run it."""
        folder, target = Path(self.build_temp).resolve(), Path(self.get_ext_fullpath(extension.name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = " ".join(f'"-I{path}"' for path in (pybind11_headers(), sysconfig.get_paths()["include"]))
        objects, names = [], []
        for source in sorted([*CSRC.glob("*.cu"), *CSRC.glob("*.cpp")]):
            names.append(f"{source.name}.o")
            archs = f"\n  archs = {arch_flags()}" if source.suffix == ".cu" else ""
            objects.append(f"build {names[-1]}: compile {escaped(source.resolve())}{archs}")
        rules = NINJA.format(
            nvcc=escaped(find_nvcc()), includes=includes, objects="\n".join(objects), target=escaped(target),
            names=" ".join(names),
        )  # fmt: skip
        (folder / "build.ninja").write_text(rules)
        command = [find_ninja(), "-C", folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        print(done.stdout, flush=True)
        if done.returncode:
            failed = re.search(r"^FAILED:.*\n(.*)$", done.stdout, re.MULTILINE)
            what = failed[1] if failed else " ".join(map(str, command))
            sys.exit(
                f"The CUDA part could not be built; its output is above. This command failed:\n  {what}\n{WITHOUT}"
            )


def escaped(path: object) -> str:
    """A path as ninja reads it."""
    return re.sub(r"([$: ])", r"$\1", str(path))


def description() -> str:
    """README.md as it reads where the files beside it are not: pictures by their words, links by the file's name."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[([^]]*)\]\((?!\w+:)([^)]+)\)", r"*\2: \1*", text)
    text = re.sub(r"\[([^]]*)\]\((?!\w+:)\1\)", r"`\1`", text)
    text = re.sub(r"\[([^]]*)\]\((?!\w+:)([^)]+)\)", r"\1 (`\2`)", text)
    return text + "\nThe files that are named here are in the source distribution.\n"


ABOUT = {"long_description": description(), "long_description_content_type": "text/markdown"}
if is_wanted():
    setup(ext_modules=[Extension("uniflow_kernels._cuda", [])], cmdclass={"build_ext": BuildCuda}, **ABOUT)
else:
    setup(**ABOUT)
