"""Several processes as one program: joining, values for all, stopping together, not waiting for the dead.

Every process runs the same command. An error that one process meets ends all of them at once, with its exit code
(`together`). A process that dies ends the others within `hosts.heartbeat_s`, through JAX's own coordination service;
one that hangs, within `hosts.stall_s`, through the watch below.
"""

import contextlib
import faulthandler
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax._src.distributed import global_state  # the only way to JAX's own store of keys and values
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from specauf_jax.config import Hosts
from specauf_jax.errors import Outcome, SpecaufError
from specauf_jax.machine import on_tpu
from specauf_jax.sharding import put_rows
from specauf_jax.signals import hearing, leave

_SLURM = ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_LOCALID")
_FAILED, _HEARD = "specauf/failed", "specauf/heard"
_LOOK_S, _TELL_S = 0.5, 5.0  # between two looks for others' failures; until all must have seen one
_LAST_S = 2.0  # that the first process stays longer than the others
_DAY_MS = 86_400_000
_others = threading.Event()  # another process's failure was heard


def together(hosts: Hosts, work: Callable[[], Outcome]) -> Outcome:
    """Run `work` as one of the run's processes; a failure in any of them ends all within seconds, with its code."""
    with joined(hosts):
        client = global_state.client
        if client is None:
            return work()
        over = threading.Event()
        looking = threading.Thread(target=_look_for_failures, args=(client, over), daemon=True)
        looking.start()
        try:
            outcome = work()
        except Exception as error:
            _give_way()
            traceback.print_exc()
            outcome = Outcome(1, f"{type(error).__name__}: {error}", failed=True)
        if outcome.failed:
            over.set()
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first, or the first process is gone
                client.key_value_set(_FAILED, json.dumps([outcome.code, outcome.said, global_state.process_id]))
            _wait_until_heard(client)
            leave(outcome.said, outcome.code)
        client.wait_at_barrier("specauf/done", _DAY_MS)  # for the one that writes the results
        over.set()
        looking.join()
        return outcome


def _look_for_failures(client, over: threading.Event) -> None:
    while not over.wait(_LOOK_S):
        try:
            code, said, index = json.loads(client.key_value_try_get(_FAILED))
        except jax.errors.JaxRuntimeError:  # there is none, or no first process any more, which JAX notices by itself
            continue
        if index != global_state.process_id:
            _others.set()
            _wait_until_heard(client)
            leave(f"process {index}: {said}", code)


def _give_way() -> None:
    """Where another process's failure may be the reason for an error: its thread tells it better, and ends this one."""
    if _others.wait(2 * _LOOK_S):
        time.sleep(2 * (_TELL_S + _LAST_S))


def _wait_until_heard(client) -> None:
    """Until every process knows of the failure; the first one leaves last, or JAX would abort those that it serves."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.wait_at_barrier(_HEARD, round(1000 * _TELL_S))
    if global_state.process_id == 0:
        time.sleep(_LAST_S)


@contextlib.contextmanager
def joined(hosts: Hosts) -> Iterator[None]:
    """This process as one of its run's, before JAX touches a device; alone where nothing tells of others.

    Raises:
      SpecaufError: the others could not be joined.
    """
    if hosts.coordinator is None and not _in_slurm_step() and not on_tpu():
        yield
        return
    # SIGTERM is for `Watch`, which also hears it while a program compiles.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX would end the process with a stack trace of its own.
    late = threading.Timer(
        hosts.join_s,
        lambda: leave(
            f"not all processes of the run came within {hosts.join_s} s (--hosts.join-s): look at the other hosts, "
            "and whether --hosts.coordinator can be reached",
            1,
        ),
    )
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            hosts.coordinator,
            hosts.count,
            hosts.index,
            initialization_timeout=hosts.join_s + 60,
            heartbeat_timeout_seconds=hosts.heartbeat_s,
            shutdown_timeout_seconds=hosts.heartbeat_s,
        )
    except (RuntimeError, ValueError) as error:
        raise SpecaufError(
            f"the run's other processes cannot be joined: {str(error).strip().splitlines()[0]}",
            "a machine that tells of them (Cloud TPU, GKE, SLURM), or the flags that do",
            "say --hosts.coordinator HOST:PORT --hosts.count N --hosts.index I",
        ) from error
    finally:
        late.cancel()
    try:
        yield
    finally:
        jax.distributed.shutdown()


def _in_slurm_step() -> bool:
    return all(name in os.environ for name in _SLURM)


def is_primary() -> bool:
    """Whether this process speaks for all: writes metrics, results and drafters."""
    return jax.process_index() == 0


def to_host(tree):
    """Arrays of any sharding as numpy, whole and the same in every process; all processes call it together."""

    def whole(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x.addressable_data(0)) if isinstance(x, jax.Array) and not x.is_fully_addressable else x

    return jax.device_get(jax.tree.map(whole, tree))


def from_primary(x: np.ndarray) -> np.ndarray:
    """The first process's value, in every process; all call it together."""
    return np.asarray(multihost_utils.broadcast_one_to_all(x))


def everywhere(ok: bool) -> bool:
    """Whether `ok` holds in every process; all call it together."""
    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


class Watch:
    """Of a training run: SIGTERM stops all processes after the same step; a process that hangs is ended.

    SIGTERM before the first step ends the process at once with `hosts.stopped_code`, as nothing is lost.
    """

    def __init__(self, hosts: Hosts):
        self._hosts = hosts
        self._requested = False
        self._agreed: jax.Array | None = None
        self._steps = 0
        self._beat: float | None = None
        self._done = threading.Event()

    def __enter__(self):
        self._ears = hearing(signal.SIGTERM, self._stop)
        self._ears.__enter__()
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, kind, error, trace):
        self._done.set()
        if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            # Not by way of the finally clauses, which would wait for whoever is gone.
            _give_way()
            leave(
                f"another process is gone, or the devices failed: {str(error).strip().splitlines()[0]}. This process "
                "ends too. Run again: it goes on from the newest checkpoint",
                1,
            )
        self._ears.__exit__(None, None, None)

    def beat(self) -> None:
        """The loop is alive: the first call starts the clock, each step ends with one."""
        self._beat = time.monotonic()

    def stopping(self, mesh: jax.sharding.Mesh) -> bool:
        """Whether to stop after this step: the same answer in every process, one step after a SIGTERM."""
        self._steps += 1
        self.beat()
        if jax.process_count() == 1:
            return self._requested
        # A request goes around with the devices' own work and is read a step later, so that nothing waits for it.
        before, self._agreed = self._agreed, _any_process(self._requested, mesh)
        return before is not None and bool(jax.device_get(before.addressable_data(0)))

    def _stop(self) -> None:
        self._requested = True
        if not self._steps:
            leave("SIGTERM before the first step: nothing to save", self._hosts.stopped_code)

    def _look(self) -> None:
        while not self._done.wait(min(1.0, self._hosts.stall_s / 4)):
            if self._beat is not None and time.monotonic() - self._beat > self._hosts.stall_s:
                faulthandler.dump_traceback()
                leave(
                    f"no step for {self._hosts.stall_s} s (--hosts.stall-s): this process, or one that it waits for, "
                    "hangs; above is where. Run again: it goes on from the newest checkpoint",
                    1,
                )


def _any_process(flag: bool, mesh: jax.sharding.Mesh) -> jax.Array:
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return _any(put_rows(np.full(jax.local_device_count(), flag), spread, mesh.size))


_any = jax.jit(lambda flags: flags.any())
