"""One model with every form that recovery must keep: pruned, factorized, quantized, pruned and
quantized, dense."""

import pytest

from optpipe.checkpoint import Checkpoint
from optpipe.lowrank.svd import Svd
from optpipe.prune.magnitude import Magnitude
from optpipe.quant.rtn import Rtn


@pytest.fixture
def mixed(run, tiny):
    def made(family="llama"):
        first, second, third = Checkpoint(tiny(family)).decoder.blocks
        pruned = run(Magnitude(targets=[f"{first.name}.*", f"{third.mlp_out}"]), tiny(family))
        targets = [f"{second.attn_out}"]
        factorized = run(Svd(keep=0.7, rank_multiple=4, targets=targets), pruned)
        coarse = Rtn(bits=3, group_size=32, targets=[f"{third.name}.*", f"{second.mlp_out}"])
        return run(coarse, factorized)

    return made
