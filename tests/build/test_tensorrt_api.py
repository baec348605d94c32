"""What the builder and the backend call exists in TensorRT 10.14 to 11.4 and TensorRT for RTX 1.7.

The calls are read from our own source, types of variables from the signatures of what made them, so
that nothing has to be listed by hand. Signatures are those of the docstrings in the wheels
(tests/build/tensorrt_api.py made the file).
"""

import ast
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

import optpipe
from optpipe.bench.tensorrt import DTYPES
from optpipe.build import nvidia

HERE, PACKAGE = Path(__file__).parent, Path(optpipe.__file__).parent
API = json.loads((HERE / "tensorrt_api.json").read_text())
RTX = "tensorrt_rtx 1.7"
FILES = [PACKAGE / "build" / "nvidia.py", PACKAGE / "build" / "causal.py",
         PACKAGE / "build" / "plan.py", PACKAGE / "build" / "validity.py",
         PACKAGE / "bench" / "tensorrt.py"]  # fmt: skip
PARAMETERS = {"module": "module", "network_tensor": "ITensor", "error": "ParserError",
              "network": "INetworkDefinition", "parser": "OnnxParser",
              "boundary": "IAttentionBoundaryLayer", "_attention()": "IAttention"}  # fmt: skip
"""Names of ours whose type the source does not tell, or whose maker is documented in C++."""
ONLY_RTX = {"ComputeCapability", "CudaGraphStrategy", "EngineValidity",
            "EngineInvalidityDiagnostics", "num_compute_capabilities", "set_compute_capability",
            "cuda_graph_strategy", "get_engine_validity", "engine_header_size"}  # fmt: skip
"""What is called for TensorRT for RTX alone."""
SINCE_11 = {"CausalMaskKind", "causal_kind", "key_value_lengths"}
"""What build.attention=lower_right needs, which older ones refuse."""


@dataclass(frozen=True)
class Use:
    """``owner.member``, called with so many arguments, or not called."""

    owner: str
    member: str
    arguments: int | None
    keywords: frozenset[str]
    where: str


class Reader(ast.NodeVisitor):
    """Follows the types of variables through our source."""

    def __init__(self, api):
        self.api, self.uses, self.called = api, set(), {}
        self.types = {"trt": "module", **PARAMETERS}

    def type_of(self, node):
        """Of an expression: a class, 'Class.Nested' or 'module'; None if it is not TensorRT's."""
        if isinstance(node, ast.Name):
            return self.types.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.type_of(node.value)
            if owner is None:
                return self.types.get(node.attr.lstrip("_"))
            if owner == "module":
                return node.attr
            inner = members(self.api, owner) or {}
            return f"{owner}.{node.attr}" if isinstance(inner.get(node.attr), dict) else None
        if isinstance(node, ast.Call):
            return self.made_by(node.func)
        return None

    def made_by(self, function):
        if isinstance(function, ast.Name):
            return self.types.get(f"{function.id}()")
        if not isinstance(function, ast.Attribute):
            return None
        owner = self.type_of(function.value)
        if owner is None:
            return self.types.get(f"{function.attr}()")
        if owner == "module":
            return function.attr
        signatures = (members(self.api, owner) or {}).get(function.attr)
        made = {
            text.rpartition("-> ")[2] for text in signatures or [] if isinstance(signatures, list)
        }
        return made.pop() if len(made) == 1 and made <= self.api["classes"].keys() else None

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        for inner in ast.walk(node):
            if isinstance(inner, ast.Return) and inner.value is not None:
                self.note(f"{node.name}()", inner.value)

    def visit_Assign(self, node):
        self.generic_visit(node)
        pairs = [(target, node.value) for target in node.targets]
        for target, value in pairs:
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs.extend(zip(target.elts, value.elts, strict=True))
                continue
            name = getattr(target, "id", None) or getattr(target, "attr", "").lstrip("_")
            if name:
                self.note(name, value)

    def note(self, name, value):
        if (found := self.type_of(value)) is not None:
            self.types[name] = found

    def visit_Call(self, node):
        self.called[node.func] = node
        self.generic_visit(node)

    def visit_Attribute(self, node):
        self.generic_visit(node)
        owner = self.type_of(node.value)
        if owner is None or node.attr.startswith("__"):
            return
        call = self.called.get(node)
        where = f"{self.file.name}:{node.lineno}"
        keywords = frozenset(k.arg for k in call.keywords) if call else frozenset()
        arguments = len(call.args) if call else None
        self.uses.add(Use(owner, node.attr, arguments, keywords, where))


def members(api, owner):
    """The members of a class, perhaps nested; of 'module', its classes. None: no such class."""
    if owner == "module":
        return api["classes"]
    found = api["classes"]
    for name in owner.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def uses():
    """All uses, with the types that the newest bindings, which have everything, tell."""
    reader = Reader(API[RTX])
    trees = [(file, ast.parse(file.read_text())) for file in FILES]
    before = None
    while before != reader.types:  # a name may get its type in a later file
        before = dict(reader.types)
        for reader.file, tree in trees:
            reader.visit(tree)
    return sorted(reader.uses, key=lambda use: (use.owner, use.member, use.where))


USES = uses()


def fits(signature, use):
    """Whether a call can be made with so many positional arguments and these keywords."""
    inside = re.match(r"\((.*)\) ->", signature)[1]
    parts = re.split(r", (?=\w+:)", inside)
    names = [part.partition(":")[0] for part in parts if part]
    optional = {name for name, part in zip(names, parts, strict=True) if " = " in part}
    names = names[1:] if names[:1] == ["self"] else names
    given = set(names[: use.arguments]) | use.keywords
    return use.arguments <= len(names) and set(names) - optional <= given <= set(names)


def test_the_source_is_read():
    print(*(f"{u.owner}.{u.member}" for u in USES), sep="\n")
    found = {f"{use.owner}.{use.member}" for use in USES}
    expected = {"Builder.build_serialized_network", "OnnxParser.parse",
                "IOptimizationProfile.set_shape", "IBuilderConfig.progress_monitor",
                "IExecutionContext.execute_async_v3", "Runtime.deserialize_cuda_engine",
                "ILogger.Severity.ERROR", "ITimingCache.serialize", "ITensor.shape",
                "EngineInspector.get_engine_information", "ParserError.desc",
                "ICudaEngine.create_execution_context", "IRuntimeConfig.cuda_graph_strategy",
                "IExecutionContext.set_tensor_address", "Runtime.get_engine_validity",
                "IAttention.key_value_lengths", "ICudaEngine.weight_streaming_budget_v2",
                "IBuilderConfig.hardware_compatibility_level", "CausalMaskKind.LOWER_RIGHT",
                "IAttentionBoundaryLayer.attention", "LayerType.ATTENTION_INPUT",
                "OnnxParser.get_layer_output_tensor", "INetworkDefinition.get_layer"}  # fmt: skip
    assert expected <= found and len(found) > 50


def causal(version):
    """Whether our own code takes this release for one that attends LOWER_RIGHT."""
    name = "tensorrt_rtx" if version == RTX else "tensorrt"
    package = nvidia.Package(name=name, version=API[version]["version"], gpu=None)
    return package.refuse_attention("lower_right") is None


@pytest.mark.parametrize("version", API)
def test_the_releases_that_attend_lower_right_are_those_with_its_api(version):
    classes = API[version]["classes"]
    found = SINCE_11 & {*classes, *classes["IAttention"]}
    assert found == (SINCE_11 if causal(version) else set())


@pytest.mark.parametrize("version", API)
@pytest.mark.parametrize("use", USES, ids=lambda u: f"{u.owner}.{u.member}@{u.where}")
def test_it_exists_with_that_signature(use, version):
    if version != RTX and ({use.member} | set(use.owner.split("."))) & ONLY_RTX:
        return
    if not causal(version) and ({use.member} | set(use.owner.split("."))) & SINCE_11:
        return
    owner = members(API[version], use.owner)
    assert owner is not None, f"{version} has no {use.owner}, or tensorrt_api.py does not list it"
    assert use.member in owner, f"{version} has no {use.owner}.{use.member}"
    member = owner[use.member]
    if use.arguments is None:
        return
    signatures = member["__init__"] if isinstance(member, dict) else member
    assert isinstance(signatures, list), f"{use.owner}.{use.member} is a {member}, not a method"
    if use.member != "__init__":
        assert any(fits(text, use) for text in signatures), signatures


@pytest.mark.parametrize("name", sorted(ONLY_RTX))
def test_what_is_for_rtx_alone_is_not_elsewhere(name):
    for version in API.keys() - {RTX}:
        classes = API[version]["classes"]
        assert name not in classes and not any(name in members for members in classes.values())


@pytest.mark.parametrize("version", API)
def test_flags_and_overridden_methods_exist(version):
    """Looked up by a name that is made, or called by TensorRT: the source does not show them."""
    classes = API[version]["classes"]
    flags = {flag.upper() for flag in (*nvidia.FLAGS, "sparse_weights")} - {"AMPERE_PLUS"}
    assert flags <= classes["BuilderFlag"].keys()
    assert "AMPERE_PLUS" in classes["HardwareCompatibilityLevel"]
    assert {name.upper() for name in DTYPES} <= classes["DataType"].keys()
    for name, method, arguments in (
        ("ILogger", "log", 2),
        ("IProgressMonitor", "phase_start", 3),
        ("IProgressMonitor", "phase_finish", 1),
        ("IProgressMonitor", "step_complete", 2),
    ):
        (signature,) = classes[name][method]
        assert fits(signature, Use(name, method, arguments, frozenset(), ""))


def test_a_call_that_does_not_exist_is_found():
    signature = "(self: X, a: int, b: list[int] = [1, 2], c: str = 'x') -> bool"
    fitting = [(1, ""), (3, ""), (1, "c"), (0, "a")]
    for arguments, keywords in (*fitting, (4, ""), (0, ""), (1, "d")):
        use = Use("X", "f", arguments, frozenset(keywords), "")
        assert fits(signature, use) == ((arguments, keywords) in fitting)


def test_the_installed_bindings_are_those_of_the_snapshot():
    rtx = pytest.importorskip("tensorrt_rtx")
    if rtx.__version__ != API[RTX]["version"]:
        pytest.skip(f"the snapshot is of {API[RTX]['version']}, installed is {rtx.__version__}")
    spec = importlib.util.spec_from_file_location("tensorrt_api", HERE / "tensorrt_api.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert json.loads(json.dumps(script.describe(rtx))) == API[RTX]
