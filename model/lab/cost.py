"""What a variant costs: context, arithmetic, seconds and bytes of a prefill and of a training step.

A prefill is the decoder's, from the tower's features on. The tower's own work for an image is counted by itself
(`tower_flops`): it depends on which views a variant reads, and how far up. A training step has it only where the tower
is trained: a variant with a frozen one reads cached features, a tuned one runs the tower forward and back, and the two
kinds' steps are not alike. Knows nothing about scores.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from model.lab.text_twin import TextTwin
from model.lab.twin import LabTwin
from model.training import packed

PREFILLS, STEPS = 9, 3  # timed; the middle one counts


def measure(
    twin: LabTwin | TextTwin,
    features: torch.Tensor,
    question: packed.Rows,
    step: Callable[[], None],
    dtype: torch.dtype,
) -> dict:
    """The cost of a prefill of one image `features` (or pixels, or a text) with one `question`, and of a training
    `step`.

    dtype: what the decoder's layers compute in. context: tokens of the image (or text) and before it. flops: two per
    multiplication and addition; of tower and prefill without the whitening of features and the low-rank changes of a
    tower, which a finished model has in its weights; of a step all that it does forward and backward from the cached
    features on (of a tuned variant, from the pixels on), but the optimizers. Bytes: the most that is allocated at once,
    beyond the weights."""
    with torch.no_grad():
        seen = twin.see(features, dtype)
        base, _ = twin.inject(seen)

    @torch.no_grad()
    def prefill():
        twin(seen, question, dtype)

    with parametrize.cached():  # changes of a tuned tower are in its matrices before anything is counted
        twin.look()
        tower_flops = flops(twin.look)
    return {
        "context": base.shape[1] + len(twin.lead),
        "tower_flops": tower_flops,
        "prefill_flops": flops(prefill) - flops(lambda: twin.whitened(seen)),
        "prefill_seconds": seconds(prefill, PREFILLS, features.device),
        "prefill_bytes": peak_bytes(prefill, features.device),
        "step_flops": flops(step),
        "step_seconds": seconds(step, STEPS, features.device),
        "step_bytes": peak_bytes(step, features.device),
    }


def flops(work: Callable[[], object]) -> int:
    """What `work` multiplies and adds, all of attention included: in a fused kernel the counter may not see it."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def seconds(work: Callable[[], None], times: int, device: torch.device) -> float:
    """The middle one of so many, after one that is not counted: on a CPU the processor's time, all threads added up,
    which other work on the machine changes less than the clock's (by up to half, not tenfold); on a GPU the clock's."""
    gpu = device.type == "cuda"
    clock = time.perf_counter if gpu else time.process_time
    taken = []
    for _ in range(times + 1):
        started = clock()
        work()
        if gpu:
            torch.cuda.synchronize(device)
        taken.append(clock() - started)
    return statistics.median(taken[1:])


def peak_bytes(work: Callable[[], None], device: torch.device) -> int:
    """The most bytes that torch holds at once while `work` runs, beyond what it held before."""
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
