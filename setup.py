"""Everything is said in pyproject.toml; the compiled parts are built from here, without torch.

Where nvcc is found the module uniflow_kernels._cuda is built from csrc/, and where a C++ compiler is found
uniflow_kernels._cpu from csrc/cpu; else they are left out: the package works without them. Environment variables:
UNIFLOW_CUDA=1 insists on the one, UNIFLOW_CUDA=0 leaves it out, UNIFLOW_CPU=1 and 0 the other; UNIFLOW_CUDA_ARCHS
lists the architectures ("80;90", "90a"), by default those of 80, 90 and 100 that nvcc knows, with PTX of the last one
for later GPUs; CUDA_HOME says where nvcc is, CXX which C++ compiler is taken.
"""

import importlib.util
import os
import platform
import re
import runpy
import shlex
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
WITHOUT_CPU = "To install without the CPU part, which is optional, say UNIFLOW_CPU=0."
# what each level of instructions is compiled with; the CPU part takes the best that a processor has
LEVELS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mprefer-vector-width=512",
}
# the loops become vector instructions only where no error number and no trap is asked for; what is rounded once is said
LOOPS = "-fno-math-errno -fno-trapping-math -ffp-contract=off"
PRODUCTS = "-fno-math-errno -fno-trapping-math -ffp-contract=fast"  # whose sums no other backend shares

# one rule for host and device code: nvcc hands .cpp files on to the host's compiler
NINJA = """\
flags = -std=c++17 -O3 {flags} {includes}
rule compile
  command = {compiler} $flags $own -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {compiler} {link} $in -o $out
{objects}
build {target}: link {names}
"""


def find_nvcc() -> str | None:
    """The compiler of CUDA_HOME, else that on the PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def find_cxx() -> str | None:
    """The command of CXX, else the compiler that Python was built with, else another on the PATH."""
    named = os.environ.get("CXX")
    of_python = (sysconfig.get_config_var("CXX") or "").split()[:1]
    commands = [named] if named else [*of_python, "c++", "g++", "clang++"]
    return next((command for command in commands if shutil.which(shlex.split(command)[0])), None)


def wish_for(variable: str) -> str:
    """What an environment variable says: "0", "1" or nothing."""
    wish = os.environ.get(variable, "")
    if wish not in ("", "0", "1"):
        sys.exit(f"{variable}: expected 0 or 1, got {wish!r}")
    return wish


def is_wanted() -> bool:
    """Whether to build the CUDA part."""
    wish = wish_for("UNIFLOW_CUDA")
    if wish == "1" and find_nvcc() is None:
        sys.exit(f"UNIFLOW_CUDA=1, but there is no nvcc on the PATH or under CUDA_HOME. {WITHOUT}")
    return wish != "0" and find_nvcc() is not None


def is_cpu_wanted() -> bool:
    """Whether to build the CPU part."""
    wish = wish_for("UNIFLOW_CPU")
    if wish == "1" and (os.name != "posix" or find_cxx() is None):
        what = f"there is no C++ compiler: {os.environ.get('CXX') or 'c++, g++ or clang++'}"
        sys.exit(f"UNIFLOW_CPU=1, but {what if os.name == 'posix' else 'it needs a POSIX system'}. {WITHOUT_CPU}")
    return wish != "0" and os.name == "posix" and find_cxx() is not None


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


def stamped(name: str) -> str:
    """The option by which a part knows its sources."""
    return f"-DUNIFLOW_SOURCES={runpy.run_path(str(ROOT / 'uniflow_kernels' / 'stamp.py'))['stamp'](name)}"


class NotBuiltError(Exception):
    """Why a compiled part could not be built."""


def pybind11_headers() -> str:
    """Those of the package, else the copy that torch carries, which is found without importing torch."""
    package, torch = importlib.util.find_spec("pybind11"), importlib.util.find_spec("torch")
    if package is not None and package.origin:
        return str(Path(package.origin).parent / "include")
    carried = Path(torch.origin).parent / "include" if torch is not None and torch.origin else ROOT
    if not (carried / "pybind11").is_dir():
        raise NotBuiltError("it needs pybind11 to be built: pip install pybind11 ninja")
    return str(carried)


def find_ninja() -> str:
    """The program of the package, else the one on the PATH."""
    package = importlib.util.find_spec("ninja")
    if shutil.which("ninja") is None and package is None:
        raise NotBuiltError("it needs ninja to be built: pip install pybind11 ninja")
    if package is None:
        return str(shutil.which("ninja"))
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


class BuildParts(build_ext):
    """Builds the compiled parts with ninja."""

    def build_extension(self, extension: Extension) -> None:
        """Build one part; without the CPU part the package serves as well, so only who insists on it hears an error."""
        if extension.name.endswith("_cuda"):
            objects = {
                f"{source.name}.o": (source, arch_flags() if source.suffix == ".cu" else stamped("_cuda"))
                for source in sorted([*CSRC.glob("*.cu"), *CSRC.glob("*.cpp")])
            }
            flags = {"flags": "-Xcompiler -fPIC,-fvisibility=hidden -cudart static", "link": "-shared -cudart static"}
            try:
                self.run_ninja(extension, escaped(find_nvcc()), objects, **flags)
            except NotBuiltError as why:
                sys.exit(f"The CUDA part could not be built: {why}\n{WITHOUT}")
            return
        folder = CSRC / "cpu"
        levels = LEVELS if platform.machine() in ("x86_64", "AMD64") else {"baseline": ""}
        objects = {"module.o": (folder / "module.cpp", stamped("_cpu"))}
        for level, own in levels.items():
            objects[f"{level}.o"] = (folder / "kernels.cpp", f"{LOOPS} {own} -DUNIFLOW_LEVEL={level}")
            objects[f"{level}_flow.o"] = (folder / "flow.cpp", f"{PRODUCTS} {own} -DUNIFLOW_LEVEL={level}")
        link = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
        flags = {"flags": "-fPIC -fvisibility=hidden", "link": link}
        try:
            self.run_ninja(extension, re.sub(r"\$", "$$", find_cxx() or ""), objects, **flags)
        except NotBuiltError as why:
            if os.environ.get("UNIFLOW_CPU") == "1":
                sys.exit(f"The CPU part could not be built: {why}\n{WITHOUT_CPU}")
            print(f"The CPU part is left out, plain PyTorch serves in its place: {why}", file=sys.stderr, flush=True)

    def run_ninja(
        self, extension: Extension, compiler: str, objects: dict[str, tuple[Path, str]], flags: str, link: str
    ) -> None:
        """Write the rules for ninja and run it.

        Args:
            extension: what is built.
            compiler: its command, as ninja reads it.
            objects: name -> the source and flags of its own.
            flags: of all of them.
            link: how they are linked.
        """
        folder = Path(self.build_temp).resolve() / extension.name
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = " ".join(f'"-I{path}"' for path in (pybind11_headers(), sysconfig.get_paths()["include"]))
        rules = NINJA.format(
            compiler=compiler, flags=flags, includes=includes, link=link, target=escaped(target),
            names=" ".join(objects),
            objects="\n".join(
                f"build {name}: compile {escaped(source.resolve())}\n  own = {own}"
                for name, (source, own) in objects.items()
            ),
        )  # fmt: skip
        (folder / "build.ninja").write_text(rules)
        command = [find_ninja(), "-C", folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        print(done.stdout, flush=True)
        if done.returncode:
            failed = re.search(r"^FAILED:.*\n(.*)$", done.stdout, re.MULTILINE)
            what = failed[1] if failed else " ".join(map(str, command))
            raise NotBuiltError(f"its output is above. This command failed:\n  {what}")


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


parts = [name for name, wanted in (("_cuda", is_wanted), ("_cpu", is_cpu_wanted)) if wanted()]
setup(
    ext_modules=[Extension(f"uniflow_kernels.{name}", [], optional=name == "_cpu") for name in parts],
    cmdclass={"build_ext": BuildParts} if parts else {},
    long_description=description(),
    long_description_content_type="text/markdown",
)
