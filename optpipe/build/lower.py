"""Canonical ONNX to the operators that ONNX Runtime is fast at: the one step between both forms.

Each rule matches a few canonical nodes and stands for them in the new graph:

    Reshape, Transpose, RotaryEmbedding, TensorScatter, Attention -> GroupQueryAttention
    DequantizeLinear, MatMul [, Add]                              -> MatMulNBits
    the same of int8 weights and inputs rounded to int8           -> MatMulIntegerToFloat
    [Add,] RMSNormalization                                       -> [Skip]SimplifiedLayerNorm
    Sigmoid, Mul                                                  -> QuickGelu (alpha 1 is SiLU)

What no rule claims is copied, what nothing needs any more (such as the masks) is left out. The
inputs and outputs keep their names, so that one loop drives both forms.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import NodeProto, helper

from optpipe.build import integer, nbits, substitute
from optpipe.build.attention import AttentionRule, emit_lengths
from optpipe.build.match import CONTRIB, Match, Product
from optpipe.export.graph import Graph, read, tensor


class Lowering:
    """Lowers the graph in ``source`` into ``out``; ``accuracy_level`` as in MatMulNBits."""

    def __init__(self, source: Path, out: Path, accuracy_level: int) -> None:
        self.source, self.accuracy_level = source, accuracy_level
        self.model, self.scratch = read(source), out / substitute.SCRATCH
        if substitute.needed(self.model):
            substitute.weights(self.model, source, self.scratch)
        self.old = self.model.graph
        self.new = Graph(out)
        self.maker = {name: node for node in self.old.node for name in node.output}
        self.weights = {proto.name: proto for proto in self.old.initializer}

    def run(self) -> None:
        made = self._matches()
        live = self._live(made)
        emit_lengths(self.new)
        for match in live:
            for name in match.inputs:
                self.keep(name)
            match.emit()
        used = {name for node in self.new.nodes for name in node.input}
        self.new.inputs.extend(v for v in self.old.input if v.name in used)
        self.new.outputs.extend(self.old.output)
        properties = {prop.key: prop.value for prop in self.model.metadata_props}
        self.new.save(**{**properties, "form": "fused"})
        self.scratch.unlink(missing_ok=True)

    def _matches(self) -> dict[str, Match]:
        """Who makes each value of the new graph; a later rule overrides an earlier one."""
        made: dict[str, Match] = {}
        rules = {
            "MatMul": self._product,
            "Add": self._biased_product,
            "RMSNormalization": self._norm,
            "Mul": self._silu,
            "Reshape": AttentionRule(self).match,
        }
        for node in self.old.node:
            rule = rules.get(node.op_type)
            match = (rule(node) if rule else None) or self._copy(node)
            made |= dict.fromkeys(match.outputs, match)
        return made

    def _live(self, made: dict[str, Match]) -> list[Match]:
        """The matches that the outputs need, every one behind those it needs itself."""
        order: dict[int, Match] = {}
        stack = [(made[value.name], False) for value in reversed(self.old.output)]
        while stack:
            match, ready = stack.pop()
            if id(match) in order:
                continue
            if ready:
                order[id(match)] = match
                continue
            stack.append((match, True))
            stack.extend((made[name], False) for name in match.inputs if name in made)
        return list(order.values())

    def keep(self, name: str) -> None:
        """Bring a weight along that a copied node still uses."""
        if name in self.weights and name not in self.new.initializers:
            proto = self.weights[name]
            data = tensor(self.source, proto)
            self.new.raw(name, proto.data_type, tuple(proto.dims), [np.ascontiguousarray(data)])

    def _copy(self, node: NodeProto) -> Match:
        inputs = [name for name in node.input if name]
        return Match(inputs, list(node.output), lambda: self.new.nodes.append(node))

    # ---- quantized products

    def quantized(self, output: str) -> Product | None:
        """The quantized projection behind ``output``, its bias included."""
        node = self.maker.get(output)
        bias = None
        if node is not None and node.op_type == "Add" and node.input[1] in self.weights:
            bias, node = node.input[1], self.maker.get(node.input[0])
        if node is None or node.op_type != "MatMul":
            return None
        weight = self.maker.get(node.input[1])
        if weight is None or weight.op_type != "DequantizeLinear":
            return None
        if weight.input[0] not in self.weights:  # a quantized cache
            return None
        dtype, x = self.weights[weight.input[0]].data_type, self.maker.get(node.input[0])
        rounded = None
        if x is not None and x.op_type == "DequantizeLinear":
            rounded = self.maker[x.input[0]]
        product = Product(node.input[0], weight, dtype, bias, rounded)
        if rounded is None:
            return product if dtype in nbits.TYPES else None
        return product if integer.takes(self, product) else None

    def _product(self, node: NodeProto) -> Match | None:
        product = self.quantized(node.output[0])
        return self._projected([product], node.output[0]) if product else None

    def _biased_product(self, node: NodeProto) -> Match | None:
        product = self.quantized(node.output[0])
        return self._projected([product], node.output[0]) if product and product.bias else None

    def _projected(self, products: list[Product], output: str) -> Match:
        return Match(self.sources(products), [output], lambda: self.emit(products, output))

    def sources(self, products: list[Product]) -> list[str]:
        """What the stand-in of projections of the same x needs."""
        rounded = products[0].rounded
        return [products[0].x] if rounded is None else list(rounded.input[:2])

    def emit(self, products: list[Product], output: str) -> str:
        """One operator for projections of the same x, side by side."""
        if products[0].rounded is None:
            return self._emit_nbits(products, output)
        return integer.emit(self, products, output)

    def _emit_nbits(self, products: list[Product], output: str) -> str:
        codes = nbits.concatenate([self._codes(p.dequantize) for p in products])
        name = f"{output}/nbits"
        inputs = [products[0].x, self.new.constant(f"{name}.codes", codes.blocks)]
        inputs.append(self.new.constant(f"{name}.scales", codes.scales))
        zeros = codes.zeros
        inputs.append("" if zeros is None else self.new.constant(f"{name}.zeros", zeros))
        if products[0].bias:
            inputs += ["", self.biases(products, f"{name}.bias")]
        return self.new.node(
            "MatMulNBits",
            inputs,
            output,
            domain=CONTRIB,
            K=codes.inputs,
            N=codes.blocks.shape[0],
            bits=codes.bits,
            block_size=codes.block_size,
            accuracy_level=self.accuracy_level,
        )

    def biases(self, products: list[Product], name: str) -> str:
        biases = [self.weight(p.bias or "") for p in products]
        return self.new.constant(name, np.concatenate(biases))

    def weight(self, name: str) -> np.ndarray:
        """A weight of the canonical graph."""
        return tensor(self.source, self.weights[name])

    def _codes(self, dequantize: NodeProto) -> nbits.Codes:
        weight, scales = (self.weights[name] for name in dequantize.input[:2])
        zeros = self.weights[dequantize.input[2]] if len(dequantize.input) > 2 else None
        attributes = {a.name: helper.get_attribute_value(a) for a in dequantize.attribute}
        return nbits.block_codes(
            tensor(self.source, weight),
            weight,
            tensor(self.source, scales),
            None if zeros is None else tensor(self.source, zeros),
            attributes.get("block_size", 0),
        )

    # ---- norms and activations

    def _norm(self, node: NodeProto) -> Match:
        x, gamma = node.input
        epsilon = next(a.f for a in node.attribute if a.name == "epsilon")
        add = self.maker.get(x)
        if add is None or add.op_type != "Add" or add.input[1] in self.weights:
            return Match(
                [x, gamma],
                [node.output[0]],
                lambda: self.new.add(
                    "SimplifiedLayerNormalization", [x, gamma], [node.output[0]], epsilon=epsilon
                ),
            )
        inputs = [add.input[1], add.input[0], gamma]
        return Match(
            inputs,
            [node.output[0], x],
            lambda: self.new.add(
                "SkipSimplifiedLayerNormalization",
                inputs,
                [node.output[0], "", "", x],
                domain=CONTRIB,
                epsilon=epsilon,
            ),
        )

    def _silu(self, node: NodeProto) -> Match | None:
        sigmoid = self.maker.get(node.input[1])
        x = node.input[0]
        if sigmoid is None or sigmoid.op_type != "Sigmoid" or sigmoid.input[0] != x:
            return None
        output = node.output[0]
        return Match(
            [x],
            [output],
            lambda: self.new.node("QuickGelu", [x], output, domain=CONTRIB, alpha=1.0),
        )
