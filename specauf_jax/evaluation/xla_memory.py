"""What a program needs on a device, from XLA's own files: bytes, largest temporary buffers, collectives."""

import math
import re
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

# Between slices, a TPU's program has send in the place of these.
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "send")
_LARGEST = 8
NAME = r"%([\w.\-]+)"
LOOP = re.compile(rf"condition={NAME}, body={NAME}")
_INSTRUCTION = re.compile(rf"\s*(?:ROOT )?{NAME} = (.*?) ([\w-]+)\((.*?)\)")  # name, results, what it does, operands
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


def measure(lowered: jax.stages.Lowered, arguments, *, code: bool) -> tuple[dict, str | None]:
    """Compile, and tell what the program needs of one device.

    Args:
      lowered: the program.
      arguments: of it, as shapes with shardings.
      code: to the end; else only until every buffer has its place. The compiler goes on then, and lets no other
        program in, until the process ends.

    Returns:
      argument_bytes, temporary_bytes, output_bytes (those that take no donated argument's place), code_bytes,
      peak_bytes (their sum), collectives, largest; and the finished program's HLO text. Without code, and where the
      compiler gave up for want of room, output, code and that text are None and the peak is what the rest needs.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as dump:
        compiled = None
        if code:
            compiled = _compiled(lowered, dump)
        else:
            _place(lowered, dump)
        program = _dumped(dump, "after_optimizations.txt")
        temporary, largest = read_buffers(_dumped(dump, "after_optimizations-buffer-assignment.txt"), program)
    found = {"collectives": read_collectives(program), "largest": largest}
    stats = None if compiled is None else compiled.memory_analysis()
    if stats is None:
        held = sum(map(_device_bytes, jax.tree.leaves(arguments)))
        sizes = {"argument_bytes": held, "temporary_bytes": temporary, "output_bytes": None, "code_bytes": None}
    else:
        sizes = {
            "argument_bytes": stats.argument_size_in_bytes,
            "temporary_bytes": stats.temp_size_in_bytes,
            "output_bytes": stats.output_size_in_bytes - stats.alias_size_in_bytes,
            "code_bytes": stats.generated_code_size_in_bytes,
        }
    everything = sizes | {"peak_bytes": sum(size or 0 for size in sizes.values())} | found
    return everything, None if compiled is None else compiled.as_text()


def _compiled(lowered, dump: str) -> jax.stages.Compiled | None:
    """None if there is not enough room."""
    try:
        return lowered.compile(compiler_options={"xla_dump_to": dump, "xla_dump_hlo_as_text": True})
    except jax.errors.JaxRuntimeError as error:
        if "exceeds available HBM" not in str(error):
            raise
        return None


def _place(lowered, dump: str) -> None:
    """Compile until the report is there that XLA writes when all buffers have their places."""
    pool = ThreadPoolExecutor(1)
    compiling = pool.submit(_compiled, lowered, dump)
    pool.shutdown(wait=False)
    while not (compiling.done() or list(Path(dump).glob("*after_optimizations-memory-usage-report.txt"))):
        time.sleep(0.5)
    time.sleep(0.5)  # until the file is whole
    if compiling.done():
        compiling.result()  # which raises what went wrong


def _dumped(folder: str, ending: str) -> str:
    """The text of the largest dumped module's file; small ones hold constants."""
    return max((path.read_text() for path in Path(folder).glob(f"*{ending}")), key=len)


def _device_bytes(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize  # of a PRNG key, too


def read_buffers(assignment: str, program: str) -> tuple[int, list[dict]]:
    """Bytes of the temporaries, and the largest of their buffers by name.

    Args:
      assignment: XLA's text of a buffer assignment; what lies in other memory than the main one has a colour.
      program: the HLO text, for what JAX calls the buffers' sources.
    """
    total, inside = 0, False
    buffers: dict[tuple[int, int], list[tuple[str, str]]] = {}
    for line in assignment.splitlines():
        if line.startswith("allocation"):
            inside = "preallocated-temp" in line and "color" not in line
            total += int(re.findall(r"size (\d+)", line)[0]) if inside else 0
        found = re.match(r" value: <\d+ ([\w.\-]+)\S* @\d+> \(size=(\d+),offset=(\d+)\): (\w+\[[\d,]*\])", line)
        if inside and found:  # values at one place, one after another, are one buffer
            buffers.setdefault((int(found[2]), int(found[3])), []).append((found[1], found[4]))
    sources = dict(re.findall(rf'{NAME} = .*?op_name="([^"]*)"', program))
    largest = []
    for (size, _), values in sorted(buffers.items(), key=lambda item: -item[0][0])[:_LARGEST]:
        name, shape = next((value for value in values if value[0] in sources), values[0])
        largest.append({"bytes": size, "shape": shape, "name": name, "source": sources.get(name, "")})
    return total, largest


def read_collectives(program: str) -> dict:
    """Kind → how often a device runs it in one call of the program, the bytes of its results (of a reduce-scatter, of
    what it takes), and of these the bytes of those that other operations run beside (`beside_bytes`)."""
    computations, entry = computations_of(program)
    callers = {called: name for name, lines in computations.items()
               for line in lines if " fusion(" in line for called in called_by(line)}  # fmt: skip
    found: dict[tuple, list[tuple[str, int, int, bool]]] = {}
    for name, runs in _runs(computations, entry).items():
        instructions = [said for line in computations[name] if (said := _INSTRUCTION.match(line))]
        results = {said[1]: said[2] for said in instructions}
        for said in instructions:
            if (kind := said[3].removesuffix("-start")) not in _COLLECTIVES:
                continue
            started, moved = said[3] != kind, said[2]
            if kind == "reduce-scatter":
                moved = " ".join(results.get(operand, "") for operand in re.findall(NAME, said[4]))
            elif "all-reduce-scatter" in name:  # so TPUs do it: a fusion of an all-reduce and of the cut of its result
                kind = "reduce-scatter"
            sizes = [_bytes(*shape) for shape in _SHAPE.findall(moved) if shape[1]]  # without a start's flags
            if started and kind not in ("all-reduce", "reduce-scatter"):  # operands, then results
                sizes = sizes[len(sizes) // 2 :]
            # Begun in one fusion, carried on and ended in others: each of them has the gather's line.
            carried = kind == "all-gather" and name in callers
            channel = re.findall(r"channel_id=\d+", said.string) if carried else []
            key = (callers[name], *channel, *_SHAPE.findall(said[2])) if channel else (name, said[1])
            found.setdefault(key, []).append((kind, runs, sum(sizes), started))
    collectives: dict[str, dict[str, int]] = {}
    for places in found.values():
        kind, runs, size, started = places[0]
        sums = collectives.setdefault(kind, {"count": 0, "bytes": 0, "beside_bytes": 0})
        sums["count"] += runs
        sums["bytes"] += runs * size
        sums["beside_bytes"] += runs * size * (started or len(places) > 1)
    return collectives


def computations_of(program: str) -> tuple[dict[str, list[str]], str]:
    """Lines of every computation by its name, and which is the program's entry."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in program.splitlines():
        head = re.match(rf"(ENTRY )?{NAME} \(.*\{{$", line)
        if head:
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    return computations, entry


def turns_of(line: str, computations: dict[str, list[str]]) -> int | None:
    """How often a loop turns, by its line: the constant below which its condition keeps a counter; None for what only
    the data know."""
    condition = "\n".join(line for name in re.findall(rf"condition={NAME}", line) for line in computations[name])
    limit = re.search(rf"ROOT .* compare\(.*{NAME}\), direction=LT", condition)
    constants = dict(re.findall(rf"{NAME} = s32\[\]\S* constant\((\d+)\)", condition))
    return int(constants[limit[1]]) if limit and limit[1] in constants else None


def called_by(line: str) -> list[str]:
    """Names of the computations that an instruction calls, but for a loop's."""
    attributes = r"(?:calls|to_apply|branch_computations|true_computation|false_computation)"
    return re.findall(NAME, " ".join(re.findall(rf"{attributes}=(\{{[^}}]*\}}|\S+)", line)))


def _runs(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs; a loop's body as often as the number says that its condition compares with."""
    runs: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        runs[name] = runs.get(name, 0) + times
        for line in computations[name]:
            if loop := LOOP.search(line):
                visit(loop[2], times * (turns_of(line, computations) or 1))
            for inner in called_by(line):
                visit(inner, times)

    visit(entry, 1)
    return runs


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"^\D+(\d+).*", r"\1", dtype))  # of "bf16", "f8e4m3fn"
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8
