"""Measuring what a list of work lacks: in this process, or by workers that Ray starts on this machine or on a cluster.

A worker keeps networks, images and histograms, and measures one setting after the other. Results are files (`points`), so that
nothing is lost whoever dies, and a worker that dies is replaced.
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from models.quant.measuring.setting import Setting

from ..program import distributed, machine, user_code
from ..program.cli import UserError, needed, one_line
from ..settings.eval_flags import EvalSettings
from .bench import Bench
from .parts import part_of
from .worklist import Job, Queue

MOST_DEATHS = 3  # of workers at the same setting


class WorkersDied(UserError):
    """It is not the job that cannot be: the machine could not."""


class Worker:
    """What runs in a process of its own."""

    def __init__(self, settings: Sequence[EvalSettings], command: str, folder: str, threads: int) -> None:
        os.chdir(folder)
        machine.keep_freed_memory()
        torch.set_num_threads(threads)
        self.settings, self.command = settings, command
        self.benches: dict[int, Bench] = {}

    def measure(self, bench: int, setting: Setting | None, wait: bool, of_several: bool) -> bool | Exception:
        """As `Bench.measure`. Returns: an error in place of raising it, where it is one for the user."""
        try:
            return self._bench(bench).measure(setting, wait, of_several=of_several)
        except (UserError, OSError) as error:
            return error

    def _bench(self, number: int) -> Bench:
        """The bench of this number, loaded; that of a block of another one's images."""
        of = self.settings[number]
        if number not in self.benches:
            if of.part is None:
                self.benches[number] = Bench(of, command=self.command)
                self.benches[number].load(logging.getLogger("worker"))
            else:
                self.benches[number] = part_of(self._bench(self.settings.index(replace(of, part=None))), of.part)
        return self.benches[number]


class Pool:
    """Measures jobs; within `with`. Workers are started for the first of them, and end with the block.

    Args: benches, which jobs name by their number; workers, how many processes measure; None: this one.
    """

    def __init__(self, benches: Sequence[Bench], workers: int | None) -> None:
        self.benches, self.workers = benches, workers
        self.make: Callable[[], Any] | None = None  # makes a worker, once Ray is started
        self.idle: list[tuple[Any, Job | None]] = []  # workers and their last jobs

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        if self.make:
            sys.modules["ray"].shutdown()

    def measure(self, jobs: Sequence[Job], done: Callable[[Job], object]) -> None:
        """Measure jobs, and call `done(job)` when one is."""
        if self.workers is None:
            self._here(Queue(jobs), done, progress=len(jobs) == 1 or sys.stderr.isatty())
            return
        if jobs and not self.make:
            self._start()
        # All others need the software, and workers take a while to start.
        self._here(Queue(job for job in jobs if job.setting is None), done)
        self._there(Queue(job for job in jobs if job.setting), done)

    def _here(self, queue: Queue, done: Callable[[Job], object], progress: bool = False) -> None:
        job = None
        while taken := queue.take(job):
            job, wait = taken
            if self.benches[job.bench].measure(job.setting, wait, progress, job.of_several):
                done(job)
            else:
                queue.busy.append(job)

    def _there(self, queue: Queue, done: Callable[[Job], object]) -> None:
        import ray

        running: dict[Any, tuple[Any, Job]] = {}
        deaths: dict[Job, int] = {}
        while True:
            while self.idle and (taken := queue.take(self.idle[-1][1])):
                job, wait = taken
                worker, _ = self.idle.pop()
                running[worker.measure.remote(job.bench, job.setting, wait, job.of_several)] = worker, job
            if not running:
                return
            [ready], _ = ray.wait(list(running))
            worker, job = running.pop(ready)
            try:
                found = ray.get(ready)
            except ray.exceptions.RayTaskError:  # a mistake in the program
                raise
            except ray.exceptions.RayError as error:
                deaths[job] = deaths.get(job, 0) + 1
                if deaths[job] == MOST_DEATHS:
                    raise WorkersDied(f"{job}: {MOST_DEATHS} workers died while measuring it, one after the other; often memory is short: "
                                    f"{one_line(error)[-400:]}") from None
                queue.put_back(job)
                self.idle.append((self.make(), None))
                continue
            if isinstance(found, Exception):
                raise found
            if found:
                done(job)
            else:
                queue.busy.append(job)
            self.idle.append((worker, job))

    def _start(self) -> None:
        """Start Ray, or connect to its cluster, and then the workers."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        address = os.environ.get("RAY_ADDRESS")
        options = {"address": address} if address else {"address": "local", "num_cpus": self.workers, "include_dashboard": False}
        threads = 1 if address else max(1, distributed.cores() // self.workers)
        found = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {"PYTHONPATH": found, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        ray.init(**options, runtime_env={"env_vars": environment}, log_to_driver=False, logging_level=logging.ERROR)
        user_code.send_along(ray.cloudpickle)
        actor = ray.remote(Worker).options(num_cpus=1, num_gpus=int(self.benches[0].device.type == "cuda"))
        arguments = [bench.settings for bench in self.benches], self.benches[0].facts["command"], os.getcwd(), threads
        self.make = lambda: actor.remote(*arguments)
        self.idle = [(self.make(), None) for _ in range(self.workers)]


def check_workers(workers: int | None) -> None:
    """Refuse workers where Ray cannot be imported, or several processes are there already. Raises: UserError."""
    if workers is None:
        return
    if distributed.world() > 1:
        raise UserError(f"--workers starts processes of its own, and torchrun has started {distributed.world()}: take one or the other")
    needed("ray", "--workers needs Ray: pip install -r requirements-cluster.txt. Or start eval.py several times, with the same flags and "
                  "folder: they share the work")
