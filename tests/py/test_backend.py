"""The backend loader, against shared objects made for the purpose; and the real CUDA backend."""
import shutil
import subprocess
from pathlib import Path

import pytest

import orchvlm
from orchvlm import BackendError, _core

ROOT = Path(__file__).parents[2]
CUDA = Path(orchvlm.__file__).with_name("_cuda.so")

FAKE = r"""
#include "backend/backend.h"
#include <stdio.h>
#include <string.h>
static ovlm_status fail(ovlm_err *err, ovlm_status code)
{
    err->code = code;
    strcpy(err->message, "the fake says no");
    return code;
}
static ovlm_status count(int64_t *n, ovlm_err *err)
{
    *n = DEVICES;
    return DEVICES ? OVLM_OK : fail(err, OVLM_E_BACKEND);
}
static ovlm_status describe(int64_t device, char *text, size_t bytes, ovlm_err *err)
{
    (void)err;
    snprintf(text, bytes, "fake device %lld", (long long)device);
    return OVLM_OK;
}
static const ovlm_ops table;
static ovlm_backend open_one = {&table, 0};
static ovlm_status open_device(const ovlm_backend_options *options, ovlm_backend **backend,
                               ovlm_err *err)
{
    *backend = &open_one;
    return options->device < DEVICES ? OVLM_OK : fail(err, OVLM_E_ARG);
}
static void close_device(ovlm_backend *backend) { (void)backend; }
static const ovlm_ops table = {OVLM_BACKEND_ABI + ABI_SHIFT, sizeof(ovlm_ops) + SIZE_SHIFT, "fake",
                               count, describe, open_device, close_device};
const ovlm_ops *ENTRY(void) { return TABLE; }
"""


@pytest.fixture
def build(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not (ROOT / "csrc").is_dir():
        pytest.skip("needs a C compiler and the sources")
    source = tmp_path / "fake.c"
    source.write_text(FAKE)

    def make(name, **defines):
        defines = dict(DEVICES=2, ABI_SHIFT=0, SIZE_SHIFT=0, ENTRY="ovlm_backend_entry",
                       TABLE="&table") | defines
        target = tmp_path / f"{name}.so"
        subprocess.run([compiler, "-std=c11", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}",
                        *(f"-D{k}={v}" for k, v in defines.items()), source, "-o", target],
                       check=True)
        return target
    return make


def test_a_backend_is_loaded_and_probed(build):
    path = build("good")
    assert _core.backend_info(path) == {
        "name": "fake", "abi": 4, "devices": ["fake device 0", "fake device 1"], "problem": None}
    assert _core.backend_probe(str(path), 1) == "fake device 1"
    with pytest.raises(ValueError, match="the fake says no"):
        _core.backend_probe(path, 7)


def test_a_backend_without_device_says_why(build):
    info = _core.backend_info(build("none", DEVICES=0))
    assert info["devices"] == [] and info["problem"] == "the fake says no"


@pytest.mark.parametrize("defines, words", [
    (dict(ABI_SHIFT=1), "speaks ABI 5, this build needs ABI 4; reinstall"),
    (dict(SIZE_SHIFT=8), "this build needs"),
    (dict(ENTRY="another_entry"), "no symbol ovlm_backend_entry"),
    (dict(TABLE="0"), "offers no operations"),
])
def test_strangers_are_refused(build, defines, words):
    with pytest.raises(BackendError, match=words):
        _core.backend_info(build("stranger", **defines))


def test_bad_paths(tmp_path):
    with pytest.raises(BackendError, match="cannot load the backend: .*absent.so"):
        _core.backend_info(tmp_path / "absent.so")
    text = tmp_path / "text.so"
    text.write_text("not a shared object")
    with pytest.raises(BackendError, match="cannot load the backend"):
        _core.backend_info(text)
    for bad in (3, None, b"a\0b"):
        with pytest.raises((TypeError, ValueError)):
            _core.backend_info(bad)
    with pytest.raises(TypeError, match="device must be an integer"):
        _core.backend_probe(text, "0")


@pytest.mark.skipif(not CUDA.exists(), reason="built without the CUDA backend")
def test_the_cuda_backend_opens_or_says_why_not():
    info = _core.backend_info(CUDA)
    assert info["name"] == "cuda" and bool(info["devices"]) != bool(info["problem"])
    if info["devices"]:
        assert _core.backend_probe(CUDA, 0) == info["devices"][0]
    else:
        assert "\n" not in info["problem"]
        with pytest.raises(BackendError) as caught:
            _core.backend_probe(CUDA, 0)
        assert str(caught.value) == info["problem"]
