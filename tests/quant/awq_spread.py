"""What it costs modelopt's AWQ that layers which read the same inputs must divide them alike.

    python tests/quant/awq_spread.py [SAMPLES TOKENS]

Each layer of the demo model is rounded to int4 in groups of 128 in units of its divided inputs:
with the divisors that modelopt itself gives it, with those of our form, and with the means that
modelopt exports. One rounding says little: divisors moved by 1 % change the perplexity as much as
the choice between them does. So each is moved six times at random, and mean and spread are printed.
"""

import statistics
import sys
import warnings

import torch
from peers import DEMO, dense, perplexity

from optpipe.calibrate import Calib
from optpipe.checkpoint import Checkpoint
from optpipe.flow import advance, call, start
from optpipe.fold import folds, shared
from optpipe.linear import Form
from optpipe.quant.presets import PRESETS, Rounding, coded, imported, observed

PRESET, GROUP, MOVES, BY = "int4_awq", 128, 6, 0.01


@torch.no_grad()
def own(checkpoint, ids_ST):
    """The divisors that modelopt gives each layer, by name."""
    lm = dense()
    with imported() as mtq:
        mtq.quantize(
            lm, PRESETS[PRESET].settings(mtq, GROUP), lambda lm: [lm(ids[None]) for ids in ids_ST]
        )
    names = [name for block in checkpoint.decoder.blocks for name in block.linears]
    return {name: observed(lm.get_submodule(name)).divisor_C for name in names}


@torch.no_grad()
def ours(checkpoint, ids_ST):
    """The divisors of our form."""
    lm, decoder, found = dense(), checkpoint.decoder, {}
    names = [name for block in decoder.blocks for name in block.linears]
    rounding = Rounding(dict.fromkeys(names, PRESET), GROUP, ids_ST)
    flow = start(lm, decoder.blocks, ids_ST)
    for index, block in enumerate(decoder.blocks):
        module = lm.get_submodule(block.name)

        def forward(_, module=module, index=index):
            for hidden in flow.hidden:
                call(module, flow, index, hidden)

        found |= rounding.calibrated(lm, decoder, block, forward)
        advance(module, flow, index)
    alone = {name: inputs.divisor_C for name, inputs in found.items()}
    return {r: shared(f, alone[r]) for f in every_fold(decoder) for r in f.readers}


def every_fold(decoder):
    return [fold for block in decoder.blocks for fold in folds(decoder, block)]


def exported(decoder, divisors):
    """Of the mean of their multipliers, where several layers read the same inputs."""
    mean = {
        fold.readers: 1 / torch.stack([1 / divisors[r] for r in fold.readers]).mean(0)
        for fold in every_fold(decoder)
    }
    return {name: mean[readers] for readers in mean for name in readers}


def costs(decoder, divisors):
    """Increase of the perplexity, percent, of every move."""
    base = perplexity(dense())
    for seed in range(MOVES):
        generator, lm = torch.Generator().manual_seed(seed), dense()
        for fold in every_fold(decoder):
            moved_C = (BY * torch.randn(len(divisors[fold.readers[0]]), generator=generator)).exp()
            for name in fold.readers:
                layer, divisor_C = lm.get_submodule(name), divisors[name] * moved_C
                layer.weight.data *= divisor_C
                form = Form(
                    rows=layer.out_features, cols=layer.in_features, bits=4, group_size=GROUP
                )
                layer.weight.data = coded(layer, form).dequantize() / divisor_C
        yield 100 * (perplexity(lm) / base - 1)


def main(samples=64, tokens=512):
    checkpoint = Checkpoint(DEMO)
    ids_ST = Calib(samples=int(samples), tokens=int(tokens)).ids(checkpoint)
    alone = own(checkpoint, ids_ST)
    kinds = {
        "of each layer, modelopt": alone,
        "shared, our form": ours(checkpoint, ids_ST),
        "shared, as modelopt exports": exported(checkpoint.decoder, alone),
    }
    for name, divisors in kinds.items():
        found = [*costs(checkpoint.decoder, divisors)]
        mean, spread = statistics.mean(found), statistics.stdev(found)
        print(
            f"{name:30} {mean:+.2f} % +- {spread:.2f}   {[round(x, 2) for x in found]}", flush=True
        )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
