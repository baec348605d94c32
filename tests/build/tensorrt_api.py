"""What the Python bindings of TensorRT offer, as JSON: names, and signatures from docstrings.

    python tests/build/tensorrt_api.py     # fetches the wheels below, writes tensorrt_api.json

Only the bindings are fetched (a few MB each). In place of the libraries that they load are empty
ones, made with the C compiler: nothing is called, only looked at.
"""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SNAPSHOT = Path(__file__).with_name("tensorrt_api.json")
WHEELS = {
    "tensorrt 10.14": ("tensorrt-cu13-bindings==10.14.1.48.post1", "tensorrt_bindings"),
    "tensorrt 11.0": ("tensorrt-cu13-bindings==11.0.0.114", "tensorrt_bindings"),
    "tensorrt 11.4": ("tensorrt-cu13-bindings==11.4.0.106", "tensorrt_bindings"),
    "tensorrt_rtx 1.7": ("tensorrt-rtx-cu13-bindings==1.7.1.116", "tensorrt_rtx_bindings"),
}
CLASSES = ("Builder", "BuilderFlag", "CausalMaskKind", "ComputeCapability", "CudaGraphStrategy",
           "DataType", "EngineInspector", "EngineInvalidityDiagnostics", "EngineValidity",
           "ExecutionContextAllocationStrategy", "HardwareCompatibilityLevel", "IAttention",
           "IAttentionBoundaryLayer", "IAttentionInputLayer", "IBuilderConfig", "ICudaEngine",
           "IExecutionContext", "IHostMemory", "ILayer", "ILogger", "INetworkDefinition",
           "IOptimizationProfile", "IProgressMonitor", "IRuntimeConfig", "ITensor",
           "ITimingCache", "LayerInformationFormat", "LayerType", "MemoryPoolType",
           "NetworkDefinitionCreationFlag", "OnnxParser", "ParserError", "ProfilingVerbosity",
           "Runtime")  # fmt: skip
SYMBOLS = ("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL",
           "createInferRuntime_INTERNAL", "createNvOnnxParserRefitter_INTERNAL",
           "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry", "getNvOnnxParserVersion",
           "getPluginRegistry", "initLibNvInferPlugins")  # fmt: skip


def describe(module):
    """Class -> member -> its signatures; of a member that is no method, its kind."""
    found = {name: _members(getattr(module, name)) for name in CLASSES if hasattr(module, name)}
    return {"version": module.__version__, "classes": found}


def _members(cls):
    members = {"__init__": _signatures("__init__", cls.__init__.__doc__)}
    for name in sorted(vars(cls)):
        value = inspect.getattr_static(cls, name)
        if isinstance(value, type):
            members[name] = _members(value)
        elif not name.startswith("_"):
            members[name] = _kind(cls, name, value)
    return members


def _kind(cls, name, value):
    if isinstance(value, property):
        return "property" if value.fset else "read-only property"
    if isinstance(getattr(cls, name), cls):
        return "value"
    return _signatures(name, value.__doc__)


def _signatures(name, doc):
    """``name(argument: type = default, ...) -> type`` of each overload, without module names."""
    lines = re.findall(rf"^\s*(?:\d+\. )?{name}\((.*)\) -> (.*)$", doc or "", re.MULTILINE)
    short = [(re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", text) for text in line) for line in lines]
    found = [f"({arguments}) -> {returned.strip()}" for arguments, returned in short]
    return [text for text in found if not text.startswith("(*args")]


def _stand_ins(folder, bindings):
    """Empty libraries with the names that the extension asks for; the folder that holds them."""
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS))
    (extension,) = (folder / bindings).glob("tensorrt*.so")
    wanted = set(re.findall(rb"lib(?:nv|tensorrt)\w+\.so\.\d+", extension.read_bytes()))
    for name in sorted(text.decode() for text in wanted):
        command = ["cc", "-shared", "-fPIC", "-o", str(folder / name), str(source)]
        subprocess.run([*command, f"-Wl,-soname,{name}"], check=True)


def _fetch(wheel, bindings):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", name, wheel]
        subprocess.run(pip, check=True)
        _stand_ins(folder, bindings)
        environment = {**os.environ, "LD_LIBRARY_PATH": name, "PYTHONPATH": name}
        command = [sys.executable, __file__, bindings]
        told = subprocess.run(command, env=environment, check=True, capture_output=True)
        return json.loads(told.stdout)


def main():
    if len(sys.argv) > 1:
        print(json.dumps(describe(importlib.import_module(sys.argv[1]))))
        return
    found = {name: _fetch(*wheel) for name, wheel in WHEELS.items()}
    SNAPSHOT.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
