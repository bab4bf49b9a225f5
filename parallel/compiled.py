"""`torch.compile` of each block, for itself.

A block is the same graph for all layers of its kind, so that two or three graphs serve a model. Kernels of ours
(`model.ops.operation`) are opaque to the compiler: it fuses what lies between them. What recomputes and what waits for the host
(experts on several processes) cannot be compiled; `train.config` refuses it. With the backend `aot_eager`, which takes the graphs
apart and fuses nothing, losses and gradients have the bits of the model that is not compiled.
"""

from model.transformer import Transformer

Compile = bool | str  # "auto" or "graphs"


def compile_blocks(model: Transformer, compile: Compile, backend: str = "inductor") -> None:
    """Let every block be compiled when it first runs. Before the model is spread over ranks.

    Args:
        compile: "auto" compiles nothing: nowhere has it been measured to gain enough. On one CPU core a step of
            `benchmarks/shapes/reference.json` took 1 to 3 % less CPU time, after minutes of compiling; on a GPU nobody has run
            it. "graphs" also captures each block as a CUDA graph, which nobody has run either.
    """
    if compile in (False, "auto"):
        return
    for block in model.model.layers:
        block.compile(backend=backend, **({"mode": "reduce-overhead"} if compile == "graphs" else {}))
