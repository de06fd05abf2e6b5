"""Several processes as one program: joining, values for all, stopping together, not waiting for the dead.

Every process runs the same command. A process that dies ends the others within `hosts.heartbeat_s`, through JAX's
own coordination service; one that hangs, within `hosts.stall_s`, through the watch below.
"""

import contextlib
import faulthandler
import glob
import importlib.util
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from specauf_jax.config import Hosts
from specauf_jax.errors import SpecaufError
from specauf_jax.sharding import put_rows

_SLURM = ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_LOCALID")
_TPU_CHIPS = ("/dev/accel*", "/dev/vfio/[0-9]*")


@contextlib.contextmanager
def joined(hosts: Hosts) -> Iterator[None]:
    """This process as one of its run's, before JAX touches a device; alone where nothing tells of others.

    Raises:
      SpecaufError: the others could not be joined.
    """
    if hosts.coordinator is None and not _in_slurm_step() and not _on_tpu():
        yield
        return
    # SIGTERM is for `Watch`, which also hears it while a program compiles.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX would end the process with a stack trace of its own.
    late = threading.Timer(
        hosts.join_s,
        lambda: _leave(
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


def _on_tpu() -> bool:
    """A machine with TPU chips, and JAX free to use them."""
    allowed = os.environ.get("JAX_PLATFORMS", "tpu").split(",")
    return "tpu" in allowed and importlib.util.find_spec("libtpu") is not None and any(map(glob.glob, _TPU_CHIPS))


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
        if threading.current_thread() is threading.main_thread():  # Python lets no other take signals
            self._ears, mouth = socket.socketpair()
            mouth.setblocking(False)
            self._before = signal.signal(signal.SIGTERM, lambda *_: None), signal.set_wakeup_fd(mouth.fileno()), mouth
            # The byte of the wake-up descriptor comes at once, a Python handler not while a program compiles.
            threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, kind, error, trace):
        self._done.set()
        if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            # Not by way of the finally clauses, which would wait for whoever is gone.
            _leave(
                f"another process is gone, or the devices failed: {str(error).strip().splitlines()[0]}. This process "
                "ends too. Run again: it goes on from the newest checkpoint",
                1,
            )
        if threading.current_thread() is threading.main_thread():
            handler, descriptor, mouth = self._before
            signal.signal(signal.SIGTERM, handler)
            signal.set_wakeup_fd(descriptor)
            mouth.close()

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

    def _listen(self) -> None:
        while received := self._ears.recv(64):
            if signal.SIGTERM in received:
                self._requested = True
                if not self._steps:
                    _leave("SIGTERM before the first step: nothing to save", self._hosts.stopped_code)
        self._ears.close()

    def _look(self) -> None:
        while not self._done.wait(min(1.0, self._hosts.stall_s / 4)):
            if self._beat is not None and time.monotonic() - self._beat > self._hosts.stall_s:
                faulthandler.dump_traceback()
                _leave(
                    f"no step for {self._hosts.stall_s} s (--hosts.stall-s): this process, or one that it waits for, "
                    "hangs; above is where. Run again: it goes on from the newest checkpoint",
                    1,
                )


def _any_process(flag: bool, mesh: jax.sharding.Mesh) -> jax.Array:
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return _any(put_rows(np.full(jax.local_device_count(), flag), spread, mesh.size))


_any = jax.jit(lambda flags: flags.any())


def _leave(reason: str, code: int) -> None:
    """End this process from a thread of it, whatever the others are doing."""
    print(f"specauf: {reason}", file=sys.stderr, flush=True)
    os._exit(code)
