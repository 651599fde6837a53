"""The rules of the house, enforced: floors, names, sizes, C API, what is exported and loaded."""
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import orchvlm
from orchvlm import _core

ROOT = Path(__file__).parents[2]
if not (ROOT / "csrc").is_dir():
    pytest.skip("the sources are not here", allow_module_level=True)

FLOORS = ("base", "plan", "backend", "cpu", "model", "engine", "pymod")
GENERATED = {"build", "dist", "__pycache__", "node_modules"}


def tree(*suffixes, under="."):
    """Source files of the repository, without what builds and tools leave behind."""
    found = []
    for path in (ROOT / under).rglob("*"):
        parts = path.relative_to(ROOT).parts
        if any(p in GENERATED or p.startswith(".") or p.endswith(".egg-info") for p in parts[:-1]):
            continue
        if parts[0].startswith("run-") or (ROOT / parts[0] / "pyvenv.cfg").exists():
            continue  # what `orchvlm train` wrote, or a virtual environment
        if path.is_file() and path.suffix in suffixes:
            found.append(path)
    return sorted(found)


def name(path):
    return str(path.relative_to(ROOT))


def without_comments(text):
    """C code with comments and strings blanked, line numbers kept."""
    pattern = r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\''
    return re.sub(pattern, lambda m: '""' if m[0][0] == '"' else re.sub(r"[^\n]", " ", m[0]), text,
                  flags=re.DOTALL)


C_FILES = tree(".c", ".h", under="csrc")
CUDA_FILES = tree(".c", ".h", ".cu", ".cuh", under="cuda")
PYMOD = [p for p in C_FILES if p.parent.name == "pymod"]


# ---------------------------------------------------------------- floors

def includes(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if match := re.match(r'\s*#\s*include\s*([<"])([^>"]+)[>"]', line):
            yield number, match[1] == "<", match[2]


def test_floors():
    """A file includes from its own floor and lower ones; Python is known to pymod alone."""
    wrong = []
    for path in C_FILES:
        if path.parent == ROOT / "csrc":
            continue
        floor = path.relative_to(ROOT / "csrc").parts[0]
        assert floor in FLOORS, f"{name(path)}: no such floor"
        for number, system, header in includes(path):
            where = f"{name(path)}:{number} includes {header}"
            if system:
                if floor != "pymod" and re.match(r"Python\.h|numpy/|cu|nccl|nv", header):
                    wrong.append(where)
                continue
            target = ROOT / "csrc" / header
            if not target.is_file():
                target = path.parent / header
            parts = target.relative_to(ROOT / "csrc").parts
            if not target.is_file() or len(parts) > 1 and (
                    FLOORS.index(parts[0]) > FLOORS.index(floor)):
                wrong.append(where)
    assert not wrong, "\n" + "\n".join(wrong)


def test_the_model_names_no_backend():
    """The order of floors would allow it; but a model runs on whatever table it was given."""
    wrong = [f"{name(path)}:{number} includes {header}" for path in C_FILES
             if path.parent.name == "model" for number, _, header in includes(path)
             if header.startswith("cpu/")]
    assert not wrong, "\n" + "\n".join(wrong)


def test_cuda_reaches_the_backend_floor_and_below_only():
    allowed = FLOORS[:FLOORS.index("backend") + 1]
    wrong = [f"{name(path)}:{number} includes {header}"
             for path in CUDA_FILES for number, system, header in includes(path)
             if not system and not (ROOT / "cuda" / header).is_file()
             and header.split("/")[0] not in (*allowed, "ovlm.h")]
    assert not wrong, "\n" + "\n".join(wrong)


def test_the_public_header_stands_alone():
    assert all(system for _, system, _ in includes(ROOT / "csrc" / "ovlm.h"))


# ---------------------------------------------------------------- names and sizes

def test_file_names_are_unique():
    seen, twice = {}, []
    for path in tree(".c", ".h", ".cu", ".py", ".ipynb"):
        if path.name == "__init__.py":
            continue
        if path.name in seen:
            twice.append(f"{name(path)} and {name(seen[path.name])}")
        seen[path.name] = path
    assert not twice, "\n" + "\n".join(twice)


def test_tests_shadow_no_standard_module():
    assert [name(p) for p in tree(".py", under="tests") if p.stem in sys.stdlib_module_names] == []


def test_files_are_short_and_narrow():
    wrong = []
    for path in tree(".c", ".h", ".cu", ".py"):
        lines = path.read_text().splitlines()
        if len(lines) > 600:
            wrong.append(f"{name(path)}: {len(lines)} lines")
        wrong += [f"{name(path)}:{i}: {len(line)} columns" for i, line in enumerate(lines, 1)
                  if len(line) > 100]
        wrong += [f"{name(path)}:{i}: tab or trailing space" for i, line in enumerate(lines, 1)
                  if "\t" in line or line != line.rstrip()]
    assert not wrong, "\n" + "\n".join(wrong)


def functions(path):
    """(line, name, lines) of each C function: from its head to the closing brace in column 0."""
    lines = without_comments(path.read_text()).splitlines()
    start = None
    for number, line in enumerate(lines, 1):
        if re.match(r"[A-Za-z_][\w *]*\b\w+\(", line) and not line.startswith("typedef"):
            start = number, re.search(r"(\w+)\(", line)[1]
        if line == "}" and start:
            yield *start, number - start[0] + 1
            start = None


def test_functions_are_short():
    sizes = [(lines, f"{name(path)}:{line}: {function} has {lines} lines")
             for path in C_FILES + CUDA_FILES if path.suffix != ".h"
             for line, function, lines in functions(path)]
    assert len(sizes) > 50
    assert [text for lines, text in sizes if lines > 75] == []
    ordered = sorted(lines for lines, _ in sizes)
    assert ordered[len(ordered) * 9 // 10] <= 50, "nine of ten functions have 50 lines or fewer"


def test_words_that_do_not_belong():
    """No notes to self, no traces of the place where the code was written."""
    words = re.compile(r"\b(TODO|FIXME|XXX|HACK|colleague|worktree|blazing|seamless(ly)?)\b"
                       r"|/work/|/root/|/tmp/|\bissue #?\d|\b(Claude|Anthropic|ChatGPT|Copilot)\b")
    wrong = []
    for path in tree(".c", ".h", ".cu", ".py", ".md", ".toml", ".ipynb", ".sh"):
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if match := words.search(line):
                wrong.append(f"{name(path)}:{number}: {match[0]}")
    assert not wrong, "\n" + "\n".join(wrong)


# ---------------------------------------------------------------- C

FORBIDDEN_CALLS = {
    r"(abort|exit|_exit|quick_exit|printf|fprintf|puts|fputs|putchar|perror|signal|system)":
        "the library neither ends the process nor prints",
    r"(strcpy|strcat|sprintf|vsprintf|gets|strtok|rand|srand|getenv|alloca|setjmp|longjmp)":
        "unsafe, or not reproducible",
}
# Borrowed references, swallowed errors, single-phase or static types: each has cost someone a bug.
FORBIDDEN_IN_PYMOD = [
    r"PyList_GET_ITEM", r"PySequence_Fast_GET_ITEM", r"PyDict_GetItem",
    r"PyDict_GetItemString", r"PyModule_AddObject", r"PyModule_Create2?", r"PyObject_HasAttr\w*",
    r"PyEval_\w+", r"PyErr_Print\w*", r"Py_FatalError", r"PyUnicode_AsUTF8AndSize",
    r"PyArg_ParseTupleAndKeywords", r"PyArray_FromDimsAndData\w*",
]


def calls(path, pattern):
    text = without_comments(path.read_text())
    for match in re.finditer(rf"(?<![\w.>])({pattern})\s*\(", text):
        yield text.count("\n", 0, match.start()) + 1, match[1], match.start(), text


def test_c_calls_that_do_not_belong():
    wrong = [f"{name(path)}:{line}: {call}(): {why}" for path in C_FILES + CUDA_FILES
             for pattern, why in FORBIDDEN_CALLS.items()
             for line, call, _, _ in calls(path, pattern)]
    assert not wrong, "\n" + "\n".join(wrong)


def test_c_api_lint():
    wrong = []
    for path in PYMOD:
        text = without_comments(path.read_text())
        for pattern in FORBIDDEN_IN_PYMOD:
            wrong += [f"{name(path)}:{line}: {call}" for line, call, _, _ in calls(path, pattern)]
        if re.search(r"static\s+PyTypeObject", text):
            wrong.append(f"{name(path)}: static type; types are made from specs")
        # A check of type raises nothing by itself.
        for match in re.finditer(r"if \((!Py\w+_Check\(.*?)\) \{\n(.*?)\n *\}", text, re.DOTALL):
            if "PyErr_" not in match[2]:
                line = text.count("\n", 0, match.start()) + 1
                wrong.append(f"{name(path)}:{line}: a failed type check sets no exception")
        # A converter's answer must be looked at.
        for line, call, at, _ in calls(path, r"PyArg_\w+|PyUnicode_FSConverter|ovlm_arg_\w+"):
            before = text[:at].rstrip()
            definition = re.search(r"(^|\n)\s*(static\s+)?(int|bool)$", before)
            if not definition and not re.search(r"(\(|!|\|\||&&|return|=|\?|:)$", before):
                wrong.append(f"{name(path)}:{line}: the result of {call} is not looked at")
    assert not wrong, "\n" + "\n".join(wrong)


def test_the_gil_is_released_around_the_library():
    """Each fallible call of ovlm.h runs without the GIL, and nothing of Python's does."""
    header = (ROOT / "csrc" / "ovlm.h").read_text()
    fallible = set(re.findall(r"OVLM_NODISCARD\s+ovlm_status\s+(ovlm_\w+)\s*\(", header))
    quick = {"ovlm_batch_cost_check", "ovlm_sequence_cost_check", "ovlm_step_plan_init"}
    wrong = []
    for path in PYMOD:
        text = without_comments(path.read_text())
        assert text.count("Py_BEGIN_ALLOW_THREADS") == text.count("Py_END_ALLOW_THREADS"), path
        spans = [m.span() for m in re.finditer(
            r"Py_BEGIN_ALLOW_THREADS.*?Py_END_ALLOW_THREADS", text, re.DOTALL)]
        for start, end in spans:
            inner = text[start:end].removeprefix("Py_BEGIN_ALLOW_THREADS")
            for call in re.findall(r"\b(Py[A-Z]\w*)\s*\(", inner):
                if call in ("PyArray_DATA", "PyArray_DIM"):  # they only read a field
                    continue
                wrong.append(f"{name(path)}: {call}() without the GIL")
        for call in sorted(fallible - quick):
            for line, _, at, _ in calls(path, call):
                if not any(start < at < end for start, end in spans):
                    wrong.append(f"{name(path)}:{line}: {call}() with the GIL held")
    assert not wrong, "\n" + "\n".join(wrong)


# ---------------------------------------------------------------- what is built and loaded

def defined_symbols(library):
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    out = subprocess.run([nm, "-D", "--defined-only", library], check=True, capture_output=True,
                         text=True).stdout
    return {line.split()[-1] for line in out.splitlines()}


def test_exported_symbols():
    symbols = defined_symbols(_core.__file__)
    if any("asan" in symbol or "ubsan" in symbol for symbol in symbols):
        pytest.skip("built with sanitizers")
    assert symbols == {"PyInit__core"}
    cuda = Path(orchvlm.__file__).with_name("_cuda.so")
    if cuda.exists():
        assert defined_symbols(cuda) == {"ovlm_backend_entry"}


def loaded_after(code):
    """Top-level modules outside the standard library, and shared objects of ours."""
    script = (f"import sys\n{code}\n"
              "tops = {m.split('.')[0] for m in list(sys.modules)}\n"
              "maps = open('/proc/self/maps').read() if sys.platform == 'linux' else ''\n"
              "print(sorted(t for t in tops if t not in sys.stdlib_module_names"
              " and not t.startswith('_')), 'orchvlm/_cuda.so' in maps)")
    out = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True,
                         env={"PYTHONPATH": ":".join(p for p in sys.path if p)}, cwd="/")
    assert out.returncode == 0, out.stderr
    return out.stdout.strip()


def test_importing_loads_nothing_but_numpy():
    assert loaded_after("import orchvlm") == "['orchvlm'] False"
    everything = "import orchvlm\nfor name in orchvlm.__all__: getattr(orchvlm, name)"
    assert loaded_after(everything) == "['numpy', 'orchvlm'] False"


def test_the_source_distribution_is_complete(tmp_path):
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist",
               "--formats=tar", "-d", tmp_path / "dist"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    with tarfile.open(next((tmp_path / "dist").glob("*.tar"))) as archive:
        packed = {member.split("/", 1)[1] for member in archive.getnames() if "/" in member}
    wanted = {name(p) for p in tree(".c", ".h", ".cu", ".map", ".py", ".md", ".toml", ".sh")}
    wanted |= {"LICENSE", "tests/c/Makefile", "setup.py"}
    assert sorted(wanted - packed) == []
