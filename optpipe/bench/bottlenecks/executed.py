"""Which products each runner executes for an artifact, and in which form it holds the weights.

Imports torch and onnx, reads headers and no weights: for a child process of the benchmark.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from onnx import GraphProto, NodeProto, TensorProto, helper

from optpipe.artifact import Artifact
from optpipe.bench.bottlenecks.cost import ITEM_BYTES, Model, PhaseCosts, Product, cell_costs
from optpipe.bench.scenario import Cell
from optpipe.checkpoint import Checkpoint
from optpipe.export.graph import read, unfused
from optpipe.family import Decoder
from optpipe.linear import BLOCKS, Form
from optpipe.model import layers

PICKS_LOGITS = "GatherND"
"""The node that picks the positions whose logits are wanted; products behind it are the head."""
INT8_ACTIVATIONS = 4
"""The accuracy_level at which MatMulNBits multiplies 8-bit integers."""


def costs(
    artifact: Artifact, dtype: str, cells: Sequence[Cell], on_gpu: bool = False
) -> dict[Cell, PhaseCosts]:
    """The costs of one artifact in each cell; ``dtype`` is what a torch artifact computes in."""
    is_torch = artifact.format == "hf"
    model = torch_model(artifact, dtype, on_gpu) if is_torch else graph_model(artifact)
    return {cell: cell_costs(model, cell) for cell in cells}


def torch_model(artifact: Artifact, dtype: str, on_gpu: bool = False) -> Model:
    """A checkpoint in transformers with its DynamicCache; on a GPU, with the rings of a graph."""
    checkpoint = Checkpoint(artifact.path)
    decoder, item = checkpoint.decoder, ITEM_BYTES[dtype]
    forms = layers(checkpoint)
    shapes = checkpoint.shapes().items()
    vectors = sum(s[0] for n, s in shapes if len(s) == 1 and n.endswith((".weight", ".bias")))
    products = [_layer(form, dtype, name.startswith(decoder.head)) for name, form in forms.items()]
    dtypes, context = (dtype, dtype), decoder.context
    cache = "in place" if on_gpu else "concatenated"
    return _model(decoder, products, float(vectors * item), dtypes, context, cache)


def graph_model(artifact: Artifact) -> Model:
    """A canonical graph or an engine in ONNX Runtime."""
    proto = read(artifact.path)
    cache = next(v for v in proto.graph.input if v.name.startswith("past_key_values"))
    about, logits = cache.type.tensor_type, proto.graph.output[0].type.tensor_type
    dtype, held = (str(helper.tensor_dtype_to_np_dtype(t.elem_type)) for t in (logits, about))
    floats = artifact.format != "tensorrt" and unfused(artifact.path)  # TensorRT keeps codes
    products = list(_graph_products(proto.graph, dtype, floats))
    fused = any(prop.key == "form" and prop.value == "fused" for prop in proto.metadata_props)
    return _model(
        Checkpoint(artifact.path).decoder,
        products,
        _vector_bytes(proto.graph),
        (dtype, held),
        about.shape.dim[2].dim_value,
        "in place" if fused else "whole",
    )


def _model(
    decoder: Decoder,
    products: Sequence[Product],
    vector_bytes: float,
    dtypes: tuple[str, str],
    capacity: int,
    cache: str,
) -> Model:
    """``dtypes`` are those of activations and of what the cache holds."""
    return Model(
        products=tuple(products),
        vector_bytes=vector_bytes,
        hidden=decoder.hidden,
        tables=1 + bool(decoder.positions),
        heads=decoder.heads,
        kv_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        windows=tuple(block.window for block in decoder.blocks),
        dtype=dtypes[0],
        kv_dtype=dtypes[1],
        capacity=capacity,
        cache=cache,
    )


def _layer(form: Form, dtype: str, head: bool) -> Product:
    """A layer in torch: a pruned one is dense, a quantized one (linear.Quantized) a byte a code.

    At every call its codes become floats in four steps: float32 (written), less the zero (read,
    written), times the scale (read, written), as the dtype (read and written unless it is float32);
    the product reads the result.
    """
    item, count = ITEM_BYTES[dtype], form.rows * form.cols
    if form.bits is None:
        return Product(rows=form.rows, cols=form.cols, bytes=count * item, dtype=dtype, head=head)
    per_group = (1 if form.number in BLOCKS else 2) + (0 if form.symmetric else 1)
    cast = 0 if dtype == "float32" else 4 + item
    zero = 8 if form.number == "int" else 0  # which floats have not
    return Product(
        rows=form.rows,
        cols=form.cols,
        bytes=count + form.scales * per_group,
        dtype=dtype,
        scratch=count * (4 + zero + 8 + cast + item),
        head=head,
    )


def _graph_products(graph: GraphProto, dtype: str, unfused: bool) -> Iterator[Product]:
    """Products with a stored weight; those between activations belong to attention.

    ONNX Runtime fuses DequantizeLinear and MatMul into MatMulNBits, which reads the codes as they
    are stored, or, if inputs are rounded with a known scale, into MatMulIntegerToFloat; where that
    is switched off, weights become floats at loading. It folds the transpose of a tied head then.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}
    head = False
    for node in graph.node:
        head = head or node.op_type == PICKS_LOGITS
        if node.op_type == "MatMulNBits":
            yield _nbits(node, weights, dtype, head)
        elif node.op_type == "MatMulIntegerToFloat":
            yield _matmul([node.input[1], node.input[3]], weights, "int8", head)
        elif node.op_type == "MatMul":
            source = maker.get(node.input[1])
            inputs = [node.input[1]] if source is None else list(source.input)
            if inputs[0] not in weights:
                continue
            inputs = [name for part in inputs for name in _stored(part, weights, maker)]
            found = _matmul(inputs, weights, dtype, head)
            if unfused and len(inputs) > 1:
                found = replace(found, bytes=found.rows * found.cols * ITEM_BYTES[dtype])
            elif len(inputs) > 1 and _rounded(maker.get(node.input[0]), maker):
                found = replace(found, dtype="int8")
            yield found


def _stored(
    name: str, weights: Mapping[str, TensorProto], maker: Mapping[str, NodeProto]
) -> list[str]:
    """What is stored of an input: itself, or, of scales that are codes again, those."""
    return [name] if name in weights else list(maker[name].input)


def _rounded(made_by: NodeProto | None, maker: Mapping[str, NodeProto]) -> bool:
    """Whether a product's inputs come from 8-bit codes with one zero point, so that it is fused."""
    if made_by is None or made_by.op_type != "DequantizeLinear":
        return False
    quantize = maker.get(made_by.input[0])
    return quantize is not None and len(quantize.input) == 3


def _nbits(node: NodeProto, weights: Mapping[str, TensorProto], dtype: str, head: bool) -> Product:
    about = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    integers = about.get("accuracy_level") == INT8_ACTIVATIONS
    return Product(
        rows=about["N"],
        cols=about["K"],
        bytes=sum(_nbytes(weights[name]) for name in node.input[1:] if name),
        dtype="int8" if integers else dtype,
        head=head,
    )


def _matmul(
    inputs: Sequence[str], weights: Mapping[str, TensorProto], dtype: str, head: bool
) -> Product:
    """A dense weight, or the codes, scales and zero points of a quantized one."""
    one, other = weights[inputs[0]].dims
    return Product(
        rows=other,
        cols=one,
        bytes=sum(_nbytes(weights[name]) for name in inputs),
        dtype=dtype,
        head=head,
    )


def _vector_bytes(graph: GraphProto) -> float:
    """Norms and biases; the scales of codes belong to their product."""
    scaled = ("DequantizeLinear", "MatMulIntegerToFloat")
    scales = {n for node in graph.node if node.op_type in scaled for n in node.input}
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    return float(
        sum(
            _nbytes(tensor)
            for tensor in graph.initializer
            if tensor.data_type in floats and len(tensor.dims) == 1 and tensor.name not in scales
        )
    )


def _nbytes(tensor: TensorProto) -> int:
    """Bytes as stored, from the header alone."""
    if tensor.data_location == TensorProto.EXTERNAL:
        return int(next(e.value for e in tensor.external_data if e.key == "length"))
    return len(tensor.raw_data)
