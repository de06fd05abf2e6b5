"""The launchers, against fakes of gcloud and SLURM that keep their state in a folder; no cloud, no cluster."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from specauf_jax.cli import COMMANDS, _parse
from specauf_jax.commands.train_settings import Train

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), LAUNCH / "slurm.sbatch"])
TPU_VM = ["bash", str(LAUNCH / "tpu_vm.sh"), "--name", "pod", "--zone", "us-west4-a"]
V5E = ["--accelerator-type", "v5litepod-16"]
GKE = [sys.executable, str(LAUNCH / "gke_jobset.py"), "--name", "auf", "--image", "r/specauf:1"]
SLURM = ["bash", str(LAUNCH / "slurm.sbatch")]
TRAIN = ["specauf", "train", "--data", "gs://bucket/some data", "--out", 'gs://bucket/$run"s']
STOPPED = ["--hosts.stopped-code", "75"]
WITH_HOSTS = {name for name, (settings, *_) in COMMANDS.items() if "hosts" in settings.__dataclass_fields__}

FAKE_GCLOUD = """
import json, os, pathlib, shutil, signal, subprocess, sys, time
world = pathlib.Path(os.environ["WORLD"])
arguments = sys.argv[3:]  # after: compute tpus
with open(world / "calls", "a") as log:
    log.write(json.dumps(arguments) + "\\n")
group, verb = arguments[:2]
state, homes = world / "state", world / "homes"

def option(name):
    return arguments[arguments.index(name) + 1]
if verb == "describe":
    if not state.exists():
        sys.exit("ERROR: NOT_FOUND: Resource was not found.")
    now = state.read_text()
    print(now)
    after = {"PROVISIONING": (world / "granted").read_text(), "SUSPENDING": "SUSPENDED"}
    state.write_text(after.get(now, now))
elif verb == "create":
    count = int(option("--node-count")) if "--node-count" in arguments else 1
    prefix = option("--node-prefix") if "--node-count" in arguments else option("--node-id")
    for i in range(count):
        for worker in range(2):
            (homes / (f"{prefix}-{i}" if count > 1 else prefix) / str(worker)).mkdir(parents=True)
    state.write_text("PROVISIONING")
elif verb == "delete":
    state.unlink()
    shutil.rmtree(homes, ignore_errors=True)
elif state.read_text() != "ACTIVE":
    sys.exit("ERROR: the TPU VM cannot be reached")
elif verb == "scp":
    *files, where = arguments[2 : arguments.index("--zone")]
    for home in (homes / where.removesuffix(":")).iterdir():
        for file in files:
            shutil.copy(file, home)
else:
    workers = sorted((homes / arguments[2]).iterdir())
    if option("--worker") != "all":
        workers = [workers[int(option("--worker"))]]
    environment = {"PATH": f"{world}/worker_bin:/usr/bin:/bin", "WORLD": str(world)}
    jobs = [subprocess.Popen(["bash", "-c", option("--command")], cwd=home, start_new_session=True,
                             env=environment | {"HOME": str(home), "HOSTNAME": home.name}) for home in workers]

    def lost(*_):
        for job in jobs:
            if job.poll() is None:
                os.killpg(job.pid, 9)
        sys.exit("ERROR: connection lost")

    signal.signal(signal.SIGTERM, lost)
    while any(job.poll() is None for job in jobs):
        time.sleep(0.02)
        if not state.exists() or state.read_text() != "ACTIVE":
            lost()
    sys.exit(next((job.returncode for job in jobs if job.returncode), 0))
"""
FAKE_PYTHON = """
case "$*" in
  "-m uv venv"*) mkdir -p .venv/bin && cp "$WORLD/specauf" .venv/bin/specauf ;;
  *) [ -f requirements.txt ] && [ -f pyproject.toml ] ;;
esac
"""
FAKE_SPECAUF = """
worker=${HOME##*/} node=${HOME%/*} node=${node##*/}
echo "$*" >> "$WORLD/ran.$node.$worker"
echo "hello from $node, worker $worker"
plan=$WORLD/plan.$node.$worker
now=$(head -n 1 "$plan" 2> /dev/null)
[ ! -f "$plan" ] || sed -i 1d "$plan"
case "$now" in
  preempted) sleep 0.3; printf SUSPENDING > "$WORLD/state"; exit 1 ;;
  waits) for _ in {1..300}; do [ ! -e "$WORLD/enough" ] || break; sleep 0.1; done ;;
  *) exit "${now:-0}" ;;
esac
"""
"""What it does in its n-th run on a worker is the n-th line of the worker's plan: 0 without one."""


def executable(path: Path, interpreter: str, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{interpreter}\n{text}")
    path.chmod(0o755)


class Cloud:
    """A folder with a fake gcloud first in PATH."""

    def __init__(self, world: Path):
        self.world = world
        executable(world / "bin/gcloud", f"{sys.executable} -IS", FAKE_GCLOUD)  # which start sooner so
        executable(world / "worker_bin/python3", "/bin/bash", FAKE_PYTHON)
        executable(world / "specauf", "/bin/bash", FAKE_SPECAUF)
        (world / "granted").write_text("ACTIVE")
        self.environment = os.environ | {"PATH": f"{world}/bin:{os.environ['PATH']}", "WORLD": str(world)}

    def plan(self, worker: str, *runs: str) -> None:
        (self.world / f"plan.{worker}").write_text("".join(f"{run}\n" for run in runs))

    def run(self, *options: str, command=TRAIN) -> subprocess.CompletedProcess:
        return subprocess.run([*self.line(*options), *(["--", *command] if command else [])], env=self.environment,
                              capture_output=True, text=True, timeout=60)  # fmt: skip

    @staticmethod
    def line(*options: str) -> list[str]:
        return [*TPU_VM, *V5E, "--poll-s", "0.05", *options]

    def calls(self, verb: str) -> list[list[str]]:
        log = self.world / "calls"
        calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [call for call in calls if call[1] == verb]

    def ran(self, worker: str) -> list[str]:
        path = self.world / f"ran.{worker}"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cloud(tmp_path):
    yield Cloud(tmp_path)
    (tmp_path / "enough").touch()  # for what still waits


def dry_run(line: list[str], *command: str, **options) -> list[list[str]]:
    """The words of each printed command."""
    done = subprocess.run([*line, *command], capture_output=True, text=True, check=True, timeout=30, **options)
    return [shlex.split(line, comments=True) for line in done.stdout.splitlines()]


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


# All of them ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run([checker, "-x", "-P", "SCRIPTDIR", str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


HELP = {"tpu_vm": TPU_VM[:2], "tpu_worker": ["bash", str(LAUNCH / "tpu_worker.sh")], "gke": GKE[:2], "slurm": SLURM,
        "test": ["bash", str(LAUNCH / "test.sh")]}  # fmt: skip


@pytest.mark.parametrize("line", HELP.values(), ids=HELP)
def test_help(line):
    done = subprocess.run([*line, "--help"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and "specauf" in done.stdout and done.stderr == ""


LITE = ["--accelerator", "tpu-v5-lite-podslice", "--topology"]
BAD = [
    ([*TPU_VM, *V5E, "--nmae", "x", "--", *TRAIN], "--nmae", "an option"),
    ([*TPU_VM, *V5E, "--zone"], "--zone without", "--zone VALUE"),
    ([*TPU_VM, *V5E, "--zone", "west", "--", *TRAIN], "'west'", "us-west4-a"),
    ([*TPU_VM, *V5E, "--name", "Pod_1", "--", *TRAIN], "'Pod_1'", "small letters"),
    ([*TPU_VM, *V5E, "--node-count", "0", "--", *TRAIN], "'0'", "from 1 on"),
    ([*TPU_VM, *V5E, "--max-restarts", "many", "--", *TRAIN], "'many'", "a number"),
    ([*TPU_VM, *V5E, "--poll-s", "soon", "--", *TRAIN], "'soon'", "seconds"),
    ([*TPU_VM, "--", *TRAIN], "''", "v5litepod-16"),
    ([*TPU_VM, "--accelerator-type", "v9-16", "--", *TRAIN], "v9-16 without --runtime-version", "both"),
    ([*TPU_VM, *V5E], "''", "specauf train"),
    ([*TPU_VM, *V5E, "--", "python", "x.py"], "python x.py", "specauf train"),
    ([*HELP["tpu_worker"]], "nothing", "one of the forms"),
    ([*HELP["tpu_worker"], "start"], "start without", "one of the forms"),
    ([*GKE, *LITE, "4x4x4", "--", *TRAIN], "'4x4x4'", "2 numbers"),
    ([*GKE, *LITE, "4x0", "--", *TRAIN], "'4x0'", "2 numbers"),
    ([*GKE, "--accelerator", "v5e", "--topology", "4x4", "--", *TRAIN], "'v5e'", "tpu-v5-lite-podslice"),
    ([*GKE, *LITE, "4x4", "--chips-per-host", "3", "--", *TRAIN], "3", "divisor of 4x4's 16"),
    ([*GKE, *LITE, "4x4", "--chips-per-host", "0", "--", *TRAIN], "0", "divisor"),
    ([*GKE, *LITE, "4x4", "--slices", "0", "--", *TRAIN], "--slices 0", "at least 1"),
    ([*GKE, *LITE, "4x4", "--name", "a.b", "--", *TRAIN], "'a.b'", "at most 40"),
    ([*GKE, *LITE, "4x4", "--image", "a b", "--", *TRAIN], "'a b'", "without spaces"),
    ([*GKE, *LITE, "4x4", "--", "python"], "['python']", "specauf and one of"),
    (SLURM, "''", "specauf train"),
    ([*SLURM, *TRAIN], "no job", "sbatch launch/slurm.sbatch"),
]


@pytest.mark.parametrize(("line", "found", "expected"), BAD, ids=[f"{expected}: {found}" for _, found, expected in BAD])
def test_bad_arguments_are_refused(line, found, expected, cloud):
    done = subprocess.run(line, env=cloud.environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and done.stdout == ""
    assert "found" in done.stderr and found in done.stderr and expected in done.stderr.partition("expected")[2]
    assert not (cloud.world / "calls").exists()


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    "line",
    [[*TPU_VM, *V5E, "--dry-run", "--"], [*GKE, *LITE, "4x4", "--"], [*SLURM, "--dry-run"]],
    ids=["tpu_vm", "gke", "slurm"],
)
def test_commands_are_those_of_several_hosts(line, name):
    done = subprocess.run([*line, "specauf", name], capture_output=True, text=True, timeout=30)
    assert done.returncode == (0 if name in WITH_HOSTS else 2)


def test_specauf_knows_the_flag_that_all_of_them_add():
    flags = [*TRAIN[2:], "--target", "gs://bucket/target", *STOPPED]
    assert _parse(Train, "train", flags).hosts.stopped_code == 75


# Cloud TPU -----------------------------------------------------------------------------------------------------------


def test_tpu_vm_dry_run_prints_the_whole_way_and_goes_none(cloud):
    lines = dry_run(cloud.line("--project", "mine", "--delete", "--dry-run"), "--", *TRAIN, env=cloud.environment)
    assert cloud.calls("describe") == []
    kinds = [words[4] if words[0] == "gcloud" else words[0] for words in lines]
    assert kinds == ["describe", "create", "describe", "tar", "scp", "ssh", "ssh", "ssh", "ssh", "delete"]
    for words in lines:
        if words[0] == "gcloud":
            assert words[1:3] == ["compute", "tpus"]
            assert (option(words, "--zone"), option(words, "--project")) == ("us-west4-a", "mine")
    create = lines[1]
    assert create[3:6] == ["queued-resources", "create", "pod"] and "--spot" in create
    assert option(create, "--accelerator-type") == "v5litepod-16"
    assert option(create, "--runtime-version") == "v2-alpha-tpuv5-lite"
    assert option(create, "--node-id") == "pod" and "--node-count" not in create
    steps = [(option(words, "--worker"), option(words, "--command")) for words in lines if words[4] == "ssh"]
    assert [worker for worker, _ in steps] == ["all", "all", "0", "all"]
    commands = [shlex.split(command)[2:] for _, command in steps]  # as a worker's shell reads it
    assert commands == [["setup"], ["start", *TRAIN, *STOPPED], ["follow", "+1"], ["code"]]
    assert {"--force", "--quiet"} < set(lines[-1])


def test_tpu_vm_dry_run_of_slices_from_a_repository():
    options = ["--node-count", "2", "--on-demand", "--repository", "https://host/it.git", "--revision", "v 1"]
    lines = dry_run([*TPU_VM, *V5E, *options, "--dry-run"], "--", *TRAIN)
    create = next(words for words in lines if words[4] == "create")
    assert (option(create, "--node-count"), option(create, "--node-prefix")) == ("2", "pod")
    assert "--node-id" not in create and "--spot" not in create
    starts = [words for words in lines if words[4] == "ssh" and " start " in option(words, "--command")]
    assert [words[5] for words in starts] == ["pod-0", "pod-1"]
    [setup, _] = [words for words in lines if words[4] == "ssh" and " setup" in option(words, "--command")]
    assert shlex.split(option(setup, "--command"))[2:] == ["setup", "https://host/it.git", "v 1"]
    assert not any(words[0] == "tar" for words in lines)


def test_tpu_vm_comes_back_after_a_preemption(cloud):
    cloud.plan("pod.0", "preempted", "0")
    done = cloud.run()
    assert done.returncode == 0, done.stderr
    assert len(cloud.calls("create")) == 2 and len(cloud.calls("delete")) == 1
    assert cloud.ran("pod.0") == [" ".join([*TRAIN[1:], *STOPPED])] * 2
    assert len(cloud.ran("pod.1")) == 2
    assert "hello from pod, worker 0" in done.stdout and "worker 1" not in done.stdout
    assert "SUSPENDED" in done.stderr and "restart 1 of" in done.stderr
    assert (cloud.world / "state").read_text() == "ACTIVE"  # nobody asked to delete it


def test_tpu_vm_slices_stopped_by_sigterm_run_again_on_the_same_resource(cloud):
    cloud.plan("pod-0.0", "75", "0")
    cloud.plan("pod-1.1", "75", "0")
    done = cloud.run("--node-count", "2", "--delete")
    assert done.returncode == 0, done.stderr
    assert len(cloud.calls("create")) == len(cloud.calls("delete")) == 1
    assert [len(cloud.ran(worker)) for worker in ("pod-0.0", "pod-0.1", "pod-1.0", "pod-1.1")] == [2] * 4
    assert not (cloud.world / "state").exists()


def test_tpu_vm_ends_with_the_code_of_a_command_that_fails(cloud):
    cloud.plan("pod.0", "1")
    cloud.plan("pod.1", "5")
    done = cloud.run()
    assert done.returncode == 5 and "ended with 5" in done.stderr
    assert "hello from pod, worker 1" in done.stderr  # what a worker says that is not shown else
    assert len(cloud.ran("pod.0")) == 1 and len(cloud.calls("create")) == 1


def test_tpu_vm_gives_up_when_restarts_are_used_up(cloud):
    (cloud.world / "granted").write_text("FAILED")
    done = cloud.run("--max-restarts", "2")
    assert done.returncode == 3 and "2 restarts (--max-restarts) are used up" in done.stderr
    assert len(cloud.calls("create")) == 3 and cloud.calls("ssh") == []


def test_tpu_vm_joins_a_run_that_goes_on_and_no_other(cloud):
    cloud.plan("pod.0", "waits")
    cloud.plan("pod.1", "waits")
    first = subprocess.Popen([*cloud.line(), "--", *TRAIN], env=cloud.environment, stdout=subprocess.PIPE, text=True,
                             stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    assert any("hello" in line for line in first.stdout)
    os.killpg(first.pid, signal.SIGTERM)
    assert "the same line joins it" in first.stdout.read() and first.wait(30) == 130
    other = cloud.run(command=[*TRAIN, "--train.steps", "7"])
    assert other.returncode == 3 and "another command is running" in other.stderr
    again = subprocess.Popen([*cloud.line(), "--", *TRAIN], env=cloud.environment, stdout=subprocess.PIPE, text=True,
                             stderr=subprocess.STDOUT)  # fmt: skip
    for line in again.stdout:
        if "joining it" in line:
            (cloud.world / "enough").touch()
    assert again.wait(30) == 0
    assert len(cloud.ran("pod.0")) == len(cloud.ran("pod.1")) == 1


def test_tpu_vm_deletes_on_request(cloud):
    (cloud.world / "state").write_text("ACTIVE")
    assert cloud.run("--delete", command=[]).returncode == 0
    assert not (cloud.world / "state").exists()
    assert cloud.run("--delete", command=[]).returncode == 3  # nothing there


def test_tpu_worker_starts_once_however_often_gcloud_asks(tmp_path):
    waits = 'echo "$*" >> "$HOME/ran"; for _ in {1..300}; do [ ! -e "$HOME/enough" ] || break; sleep 0.1; done; exit 9'
    (tmp_path / "specauf_jax/.venv").mkdir(parents=True)
    executable(tmp_path / "specauf_jax/.venv/bin/specauf", "/bin/bash", waits)

    def worker(*words):
        line, environment = [*HELP["tpu_worker"], *words], {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=30)

    assert worker("running", *TRAIN).returncode == 1
    assert [worker("start", *TRAIN).returncode for _ in range(2)] == [0, 0]
    assert [worker("running", *TRAIN).returncode, worker("start", "specauf", "evaluate").returncode] == [0, 4]
    (tmp_path / "enough").touch()
    assert worker("code").stdout == "specauf-exit 9\n"
    assert (tmp_path / "ran").read_text() == f"{' '.join(TRAIN[1:])}\n"
    (tmp_path / ".specauf_run/code").unlink()  # as if the machine had gone down under it
    assert worker("code").stdout == "specauf-exit lost\n"


def test_tpu_worker_follows_a_repository(tmp_path):
    executable(tmp_path / "bin/python3", "/bin/bash", "exit 0")
    repository, home = tmp_path / "repository", tmp_path / "home"
    home.mkdir()
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "HOME": str(home)}

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(
            ["git", "-C", str(repository), *who, *arguments], env=environment, check=True, capture_output=True
        )

    repository.mkdir()
    git("init", "--initial-branch", "main")
    for text in ("first", "second"):
        (repository / "requirements.txt").write_text(text)
        git("add", "-A")
        git("commit", "--message", text)
        line = [*HELP["tpu_worker"], "setup", f"file://{repository}", "HEAD"]
        subprocess.run(line, env=environment, check=True, capture_output=True, timeout=30)
        assert (home / "specauf_jax/requirements.txt").read_text() == text


# GKE -----------------------------------------------------------------------------------------------------------------


def render(*options: str) -> dict:
    done = subprocess.run([*GKE, *options, "--", *TRAIN], capture_output=True, text=True, timeout=30, check=True)
    return yaml.safe_load(done.stdout)


V5P = ["--accelerator", "tpu-v5p-slice", "--topology", "2x2x4"]


@pytest.mark.parametrize(
    ("options", "slices", "hosts", "chips"),
    [
        ([*LITE, "4x4"], 1, 4, 4),
        ([*LITE, "1x1"], 1, 1, 1),
        ([*LITE, "2x4", "--chips-per-host", "8"], 1, 1, 8),
        ([*V5P, "--slices", "2", "--on-demand", "--max-restarts", "7"], 2, 4, 4),
    ],
)
def test_jobset_is_valid_and_consistent(options, slices, hosts, chips):
    jobset = render(*options)
    assert set(jobset) == {"apiVersion", "kind", "metadata", "spec"}
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    check_jobset_fields(jobset["spec"])
    [replicated] = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "auf-slice-0"}, **replicated["template"]}
    kubernetes_validate.validate(job, "1.37", strict=True)
    assert (replicated["replicas"], job["spec"]["parallelism"], job["spec"]["completions"]) == (slices, hosts, hosts)
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["command"] == [*TRAIN, *STOPPED] and container["image"] == "r/specauf:1"
    assert container["resources"] == {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == options[1]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == options[3]
    spot = [pod["nodeSelector"].get("cloud.google.com/gke-spot"), *(each["key"] for each in pod["tolerations"])]
    assert spot == ([None, "google.com/tpu"] if "--on-demand" in options
                    else ["true", "google.com/tpu", "cloud.google.com/gke-spot"])  # fmt: skip


def check_jobset_fields(spec: dict) -> None:
    """What of JobSet's own API v1alpha2 the template uses: names, types and values allowed there."""
    assert set(spec) == {"failurePolicy", "replicatedJobs"}
    policy = spec["failurePolicy"]
    assert set(policy) == {"maxRestarts", "rules"} and isinstance(policy["maxRestarts"], int)
    for rule in policy["rules"]:
        assert set(rule) <= {"name", "action", "onJobFailureReasons", "targetReplicatedJobs"}
        assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
        assert rule["action"] in {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}
        assert set(rule["onJobFailureReasons"]) <= {"BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"}
    for replicated in spec["replicatedJobs"]:
        assert set(replicated) == {"name", "replicas", "template"}
        assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", replicated["name"])


def test_jobset_restarts_all_but_for_bad_input():
    spec = render(*V5P, "--max-restarts", "7")["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 7
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    # One failure fails the Job; exit code 2 alone as PodFailurePolicy, the only reason not to start all again.
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2, 3]
    assert rule["onExitCodes"]["operator"] == "In"
    assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    [rule] = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert pod["terminationGracePeriodSeconds"] >= 30


def test_image_installs_what_the_jobset_runs():
    text = (LAUNCH / "Dockerfile").read_text()
    root = LAUNCH.parent
    copied = [word for line in re.findall("^COPY (.*)$", text, re.M) for word in line.split()[:-1]]
    assert {"specauf_jax", "configs", "requirements.txt", "pyproject.toml"} <= set(copied)
    assert all((root / name).exists() for name in copied)
    assert "jax[tpu]" in text


# SLURM ---------------------------------------------------------------------------------------------------------------

FAKE_SRUN = """
import json, os, pathlib, subprocess, sys
world = pathlib.Path(os.environ["WORLD"])
(world / "srun").write_text(json.dumps(sys.argv[1:]))
command = sys.argv[2:]
tasks = [subprocess.Popen(command, env=os.environ | {"SLURM_NTASKS": "2", "SLURM_PROCID": str(i), "SLURM_LOCALID": "0",
                                                     "SLURM_STEP_NODELIST": "localhost"}) for i in range(2)]
sys.exit(max(task.wait() for task in tasks))
"""
JOINED = """
import os, jax
from specauf_jax.config import Hosts
from specauf_jax.distributed import joined
with joined(Hosts(join_s=40)):
    line = f"process {jax.process_index()} of {jax.process_count()}, {os.environ['JAX_LOCAL_DEVICE_IDS']}\\n"
    os.write(1, line.encode())  # at once: print may write the end of the line later, after another process's
"""


def slurm_job(world: Path, body: str, interpreter="/bin/bash", **environment) -> subprocess.CompletedProcess:
    """The script as in a job of two tasks, `body` in place of specauf."""
    executable(world / "bin/srun", f"{sys.executable} -IS", FAKE_SRUN)
    executable(world / "bin/squeue", "/bin/bash", 'echo "$JOB_STATE"')
    executable(world / "bin/scontrol", "/bin/bash", 'echo "$*" >> "$WORLD/scontrol"')
    executable(world / "bin/specauf", interpreter, body)
    path = f"{world}/bin:{os.environ['PATH']}"
    environment = {"PATH": path, "WORLD": str(world), "SLURM_JOB_ID": "41", "JOB_STATE": "RUNNING"} | environment
    return subprocess.run([*SLURM, *TRAIN], cwd=world, env=os.environ | environment, capture_output=True, text=True,
                          timeout=60)  # fmt: skip


def test_slurm_dry_run():
    submit, run, requeue = dry_run([*SLURM, "--dry-run"], *TRAIN)
    assert submit == ["sbatch", "launch/slurm.sbatch", *TRAIN]
    assert run == ["srun", "--kill-on-bad-exit=0", *TRAIN, *STOPPED]
    assert requeue[:2] == ["scontrol", "requeue"]


def test_slurm_options_fit_what_the_script_relies_on():
    text = (LAUNCH / "slurm.sbatch").read_text()
    head = text[: text.index("set -euo")]
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in head.splitlines()[1:])
    assert options["ntasks-per-node"] == "1" and "requeue" in options and options["open-mode"] == "append"
    name, seconds = options["signal"].split("@")
    assert name == "TERM" and int(seconds) >= 30  # to the tasks, not to the script: no B: in front


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        (0, "RUNNING", False),
        (75, "RUNNING", True),
        (74, "RUNNING", True),
        (75, "CANCELLED", False),
        (2, "RUNNING", False),
    ],
)
def test_slurm_requeues_what_was_stopped(code, state, requeued, tmp_path):
    done = slurm_job(tmp_path, f"exit {code}", JOB_STATE=state)
    assert done.returncode == code, done.stderr
    assert json.loads((tmp_path / "srun").read_text())[1:] == [*TRAIN, *STOPPED]
    called = tmp_path / "scontrol"
    assert (called.read_text() if called.exists() else "") == ("requeue 41\n" if requeued else "")


def test_slurm_tasks_join_by_the_environment(tmp_path):
    with socket.socket() as probe:  # the coordinator's port follows from the job's id: find one that is free
        port = next(port for port in range(61440, 65536) if probe.connect_ex(("127.0.0.1", port)))
    done = slurm_job(tmp_path, JOINED, sys.executable, SLURM_JOB_ID=str(port - 61440), SLURM_GPUS_ON_NODE="4",
                     JAX_PLATFORMS="cpu", PYTHONPATH=str(LAUNCH.parent))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"process {i} of 2, 0,1,2,3" for i in range(2)]
