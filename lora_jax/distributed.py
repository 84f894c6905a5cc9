"""Several processes, on one host or many: how they find each other, agree, and fail together.

`initialize` joins the processes of a run before anything else is done with JAX; `jax.devices()` is then the devices of
all of them, and a mesh (`lora_jax.sharding`) may span them. Every process runs the same program on the same data; each
holds the shares of its own devices, and reads only those bytes of the weights. What is written is written by the first
process, but for arrays of checkpoints, of which Orbax has every process write its own.

JAX's coordination service runs in process 0. All processes send it signs of life, and when it has had none of one for
`HEARTBEAT` seconds, or is gone itself, JAX ends the others.
"""

import contextlib
import dataclasses
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "HEARTBEAT",
    "Launch",
    "Preemption",
    "ProcessError",
    "agree",
    "check_shared_folder",
    "detect",
    "end",
    "explain_lost_peer",
]
__all__ += ["gather", "gather_arrays", "initialize", "is_first", "own_share", "several", "together"]

HEARTBEAT = 30  # seconds; JAX's own default is 100
_PART = 2**20  # numbers of an array that processes exchange at a time
_LAST_WORDS = 3  # seconds that process 0 waits at an error: others that have it too can then say so before it ends them


class ProcessError(RuntimeError):
    """Another process could not be reached, has ended, or has failed."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """What a launcher says of the processes that it has started."""

    by: str  # its name
    coordinator: str | None  # HOST:PORT of process 0; None: JAX finds it out
    num_processes: int
    process_id: int
    local_id: int | None = None  # number of this process on its host
    local_count: int | None = None  # processes on its host


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 120,
) -> bool:
    """Joins the processes of a run; call it before anything else is done with JAX. A second call does nothing.

    Without arguments the launcher's environment variables decide: Slurm, Open MPI, Kubernetes (JAX's own detection), or
    torchrun's. With several processes on a host each takes one GPU, else all of its host. CPUs talk by Gloo.

    Args:
      coordinator: HOST:PORT, an address of process 0 and a free port there, the same for all processes.
      num_processes: how many there are; None for what the launcher says.
      process_id: which this is, from 0; None for what the launcher says.
      timeout: seconds to wait for the others.

    Returns:
      Whether there are several processes.

    Raises:
      ValueError: arguments that contradict each other, or too few.
      RuntimeError: JAX has been used already.
      ProcessError: process 0 cannot be reached; or processes have unequal device counts.
        Where another process does not come, JAX ends this one, after a message of ours.
    """
    import jax

    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    launch = _settle(detect(os.environ), coordinator, num_processes, process_id)
    if launch is None or launch.num_processes == 1:
        return False
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if launch.coordinator is not None and launch.process_id > 0:
        _await_coordinator(launch, timeout)
    # JAX aborts the process then, and says only that another one may have died.
    last_words = threading.Timer(
        timeout - 0.5, lambda: print("lora-jax:", _nobody_came(launch, timeout), file=sys.stderr, flush=True)
    )
    last_words.start()
    try:
        jax.distributed.initialize(
            launch.coordinator,
            launch.num_processes,
            launch.process_id,
            local_device_ids=_local_devices(launch),
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except jax.errors.JaxRuntimeError as error:
        raise ProcessError(f"{_nobody_came(launch, timeout)} ({_first_line(error)})") from None
    finally:
        last_words.cancel()
    sys.excepthook = _end_at_error
    devices = Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        raise ProcessError(
            f"processes have unequal numbers of devices: {dict(devices)}; give each as many as the others"
        )
    return True


def _await_coordinator(launch: Launch, timeout: float) -> None:
    """Returns when something listens at the coordinator's address."""
    assert launch.coordinator is not None
    host, port = launch.coordinator.rsplit(":", 1)
    until = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise ProcessError(f"{_nobody_came(launch, timeout)} ({error})") from None
        time.sleep(0.2)


def _nobody_came(launch: Launch, timeout: float) -> str:
    return (
        f"process {launch.process_id} of {launch.num_processes}: not all processes met at "
        f"{launch.coordinator or f'the address that {launch.by} gives'} within {timeout:g} s. Check that all were "
        "started, each with a process id of its own; that process 0 runs on that host; and that the port is free there "
        "and open to the others."
    )


def detect(environment: Mapping[str, str]) -> Launch | None:
    """What the environment variables of a launcher say; None where none has started this process.

    Raises:
      ValueError: a variable is not the number it should be.
    """

    def number(name: str) -> int:
        try:
            return int(environment[name])
        except ValueError:
            raise ValueError(f"the environment variable {name}={environment[name]!r} should be a number") from None

    def have(*names: str) -> bool:
        return all(name in environment for name in names)

    if have("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"):
        # Where torchrun's agents keep a store of their own, it is at the port.
        port = number("MASTER_PORT") + (environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True")
        local = (number("LOCAL_RANK"), number("LOCAL_WORLD_SIZE")) if have("LOCAL_RANK", "LOCAL_WORLD_SIZE") else ()
        address = f"{environment['MASTER_ADDR']}:{port}"
        return Launch("torchrun", address, number("WORLD_SIZE"), number("RANK"), *local)
    if have("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        count, local_count = number("OMPI_COMM_WORLD_SIZE"), int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", 0))
        # On one host no address has to be known, and a port follows from the job's name.
        port = 61440 + zlib.crc32(environment.get("PMIX_NAMESPACE", "").encode()) % 4096
        address = f"localhost:{port}" if local_count == count else None
        rank, local_rank = number("OMPI_COMM_WORLD_RANK"), number("OMPI_COMM_WORLD_LOCAL_RANK")
        return Launch("Open MPI", address, count, rank, local_rank, local_count or None)
    if have("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"):
        tasks = _per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", "")))
        node = int(environment.get("SLURM_NODEID", 0))
        local_count = tasks[node] if node < len(tasks) else None
        ids = number("SLURM_NTASKS"), number("SLURM_PROCID"), number("SLURM_LOCALID")
        return Launch("Slurm", None, *ids, local_count)
    if have("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"):
        from jax._src.clusters.k8s_cluster import K8sCluster  # JAX has no public name for it

        if K8sCluster.is_env_present():
            return Launch("Kubernetes", None, K8sCluster.get_process_count(), number("JOB_COMPLETION_INDEX"))
    return None


def _per_node(text: str) -> list[int]:
    """[2, 2, 1] of Slurm's "2(x2),1"."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in found for _ in range(int(nodes or 1))]


def _settle(
    launch: Launch | None, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Launch | None:
    """What was given, with the launcher's word for the rest."""
    if (coordinator, num_processes, process_id) == (None, None, None):
        return launch
    if launch is None:
        launch = Launch("the caller", None, -1 if num_processes is None else num_processes, -1)
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    launch = dataclasses.replace(launch, **{name: value for name, value in given.items() if value is not None})
    known = launch.coordinator or launch.by != "the caller"
    missing = [
        name for name, there in (("coordinator", known), ("num_processes", launch.num_processes != -1)) if not there
    ]
    missing += ["process_id"] if launch.process_id == -1 and process_id is None else []
    if missing:
        raise ValueError(
            f"several processes want coordinator, num_processes and process_id; missing: {', '.join(missing)}. Give "
            "all three, or start them by Slurm, Open MPI or torchrun, which say so themselves"
        )
    if launch.coordinator and not re.fullmatch(r".+:\d+", launch.coordinator):
        raise ValueError(f"coordinator={launch.coordinator!r}; wanted HOST:PORT, such as node0:1234")
    if launch.num_processes < 1 or not 0 <= launch.process_id < launch.num_processes:
        raise ValueError(
            f"process_id={launch.process_id} of num_processes={launch.num_processes}; ids count from 0 to the number "
            "of processes less 1"
        )
    return launch


def _local_devices(launch: Launch) -> list[int]:
    """The GPU of a process that shares its host with others; [], which is all that it sees, where it does not."""
    alone = launch.local_id is None or launch.local_count == 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    given_one = bool(visible) and "," not in visible  # the launcher has chosen already
    return [] if alone or given_one or launch.local_id is None else [launch.local_id]


# ---- all together ---------------------------------------------------------------------------------------------------


def several() -> bool:
    """Whether there are several processes."""
    jax = sys.modules.get("jax")  # what has not been imported has not been initialised
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes and speaks for all."""
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """What every process has given, in their order; all must call it. Values are what JSON can hold."""
    if not several():
        return [value]
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = np.asarray(process_allgather(np.int32(len(data)))).ravel()
    padded = np.zeros(1 << max(10, int(lengths.max()).bit_length()), np.uint8)  # few sizes, so few programs
    padded[: len(data)] = data
    rows = np.asarray(process_allgather(padded))
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def gather_arrays(array: "np.ndarray") -> "list[np.ndarray]":
    """The int32 arrays [n], of any lengths, that all processes have given, in their order; all must call it."""
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    lengths = gather(len(array))
    # Parts of one size, so that there is one program, and devices hold little of it at a time.
    part = min(_PART, 1 << max(lengths).bit_length())
    padded = np.zeros(-(-max(lengths) // part) * part, np.int32)
    padded[: len(array)] = array
    parts = [np.asarray(process_allgather(padded[at : at + part])) for at in range(0, len(padded), part)]
    rows = np.concatenate(parts, axis=1) if parts else np.zeros((len(lengths), 0), np.int32)
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def own_share(count: int) -> range:
    """Which of `count` things this process does, if processes share them out in turn."""
    import jax

    number, processes = jax.process_index(), jax.process_count()
    return range(number * count // processes, (number + 1) * count // processes)


def agree(what: str, values: Mapping[str, Any]) -> None:
    """Raises ValueError in every process if some do not have the values of process 0.

    Args:
      what: they are of, for the message.
      values: by name, what JSON can hold.
    """
    first, *others = gather(dict(values))
    for number, other in enumerate(others, 1):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if names:
            some = "; ".join(
                f"{n} is {first.get(n)!r} in process 0 and {other.get(n)!r} in {number}" for n in names[:3]
            )
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"processes disagree about {what}: {some}{more}. Start all processes with the same settings and files"
            )


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """The block ends in all processes, or raises in all.

    Raises:
      ProcessError: where it has gone well, but not in another process.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if not several():
            raise
        failure = error
    failures = gather(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for number, text in enumerate(failures):
        if text is not None:
            raise ProcessError(f"{what}: process {number} could not: {text}")


def check_shared_folder(folder: Any) -> None:
    """Raises ValueError in every process if they do not all see the first one's `folder`, which exists there."""
    if not several():
        return
    mark = folder / f".seen-{os.getpid()}" if is_first() else None
    name = None
    if mark is not None:
        with contextlib.suppress(OSError):  # who cannot write says so later
            mark.touch()
            name = mark.name
    name = gather(name)[0]
    seen = gather(name is None or (folder / name).exists())
    if mark is not None:
        mark.unlink(missing_ok=True)
    if not all(seen):
        blind = [str(number) for number, sees in enumerate(seen) if not sees]
        raise ValueError(
            f"{folder} of process 0 is not that of process {', '.join(blind)}: several hosts want an output_dir on a "
            "file system that they share"
        )


class Preemption:
    """SIGTERM to any process stops all after the same step; in place of `lora_jax.guards.StopSignals`.

    JAX takes the signal and tells the others. Ctrl-C ends a process at once, and with it the others.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "Preemption":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def look(self, step: int) -> None:
        """Sets `received` after the step at which all processes are to stop; all call it after every step."""
        import signal

        from jax.experimental.multihost_utils import reached_preemption_sync_point

        if reached_preemption_sync_point(step):
            self.received = signal.SIGTERM

    def leave(self) -> None:
        """Ends the program with exit status 128 + 15 if it was stopped."""
        if self.received is not None:
            raise SystemExit(128 + self.received)


# ---- the end --------------------------------------------------------------------------------------------------------


def explain_lost_peer(error: BaseException) -> str | None:
    """What to tell if a collective failed since another process has left it, or never came; None for other errors."""
    import jax

    if not several() or not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    text = str(error)
    if not re.search(r"gloo|nccl|coordination service|another task|heartbeat|connection (closed|reset)", text, re.I):
        return None
    return (
        f"process {jax.process_index()}: another process of this run has ended or cannot be reached, so this one ends "
        f"too. Its own last words say why; a run that saves can be continued from its last checkpoint, also with fewer "
        f"devices. ({_first_line(error)})"
    )


def end(status: int) -> NoReturn:
    """Ends this process without waiting for the others, which then end too: at a normal exit JAX waits for all."""
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():  # it is the coordinator, whose end is that of all
        time.sleep(_LAST_WORDS)
    os._exit(status)


def _end_at_error(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    traceback.print_exception(kind, error, trace)
    end(130 if issubclass(kind, KeyboardInterrupt) else 1)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
