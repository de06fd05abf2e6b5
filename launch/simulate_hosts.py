"""Run a command as several processes on this machine, as a pod's hosts would: jax.distributed, over the loopback.

    python launch/simulate_hosts.py -n 4 --devices-per-host 2 -- train --config configs/tiny_cpu.py --target …

Every process has its own CPU devices. Lines of output begin with the process's number. SIGTERM and SIGINT go on to
all of them. Exits with the first exit code that is not 0, once all have ended.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--hosts", type=int, default=2, help="processes")
    parser.add_argument("--devices-per-host", type=int, default=1)
    parser.add_argument("command", nargs="+", help="specauf's command and its settings, after --")
    arguments = parser.parse_args()
    if min(arguments.hosts, arguments.devices_per_host) < 1:
        parser.error("-n and --devices-per-host must be at least 1")
    processes = start(arguments.command, arguments.hosts, arguments.devices_per_host, stdout=subprocess.PIPE,
                      stderr=subprocess.STDOUT, text=True, errors="replace")  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: [process.send_signal(number) for process in processes])
    threads = [threading.Thread(target=_prefixed, args=pair) for pair in enumerate(processes)]
    for thread in threads:
        thread.start()
    codes = [process.wait() for process in processes]
    for thread in threads:
        thread.join()
    for i, code in enumerate(codes):
        if code:
            print(f"[{i}] ended with {f'signal {-code}' if code < 0 else f'code {code}'}", flush=True)
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


def start(command: list[str], hosts: int, devices: int, **options) -> list[subprocess.Popen]:
    """One process a host, each told of the others; `options` go to Popen."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1"}
    told = [] if hosts == 1 else ["--hosts.coordinator", f"127.0.0.1:{port}", "--hosts.count", str(hosts)]
    own = [[*told, "--hosts.index", str(i)] if told else [] for i in range(hosts)]
    base = [sys.executable, "-m", "specauf_jax", *command]
    return [subprocess.Popen([*base, *extra], env=environment, **options) for extra in own]


def _prefixed(number: int, process: subprocess.Popen) -> None:
    for line in process.stdout:
        print(f"[{number}] {line}", end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
