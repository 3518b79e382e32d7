"""What is to be measured (`Worklist`), and in which order several workers take it (`Queue`)."""

import itertools
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from models.quant.measuring.measure import Record
from models.quant.measuring.setting import Setting, reads_of

from .bench import FLOAT, Bench


@dataclass(frozen=True)
class Job:
    """One setting of one network, with one chip where it has any. Attributes: bench, which of several; setting, None for the software;
    group, the same for settings that share the histograms of their reads, which one worker therefore takes one after the other;
    of_several, whether its chip is one of several; baseline, what the software is called."""

    bench: int
    setting: Setting | None
    group: Hashable
    of_several: bool = False
    baseline: str = "software"

    def __str__(self) -> str:
        """As tables name it."""
        return f"{self.setting or self.baseline}" + (f", chip {self.setting.chips.chip_seed}" if self.of_several else "")


class Worklist:
    """The settings of some networks, and which of them are measured already.

    Args: settings, of some of the benches, None for the software; shard, `(i, n)`: the i-th of n parts alone, each of which has, as
        far as can be, whole groups, and the software. Parts do not depend on what is measured already.
    Attributes: wholes, `{(bench, setting): its jobs}`; done, those whose points are there; jobs, all of this part; missing,
        those that are not measured; floats, `{bench: whether it is measured}` of float networks that were converted, which are measured
        before any job of theirs.
    """

    def __init__(self, benches: Sequence[Bench], settings: Mapping[Bench, Iterable[Setting | None]],
                 shard: tuple[int, int] | None = None) -> None:
        self.benches, self.wholes = benches, {}
        for bench, each in settings.items():
            for setting in each:
                self.wholes[bench, setting] = _jobs(benches.index(bench), setting, bench.baseline)
        self.jobs = [job for jobs in self.wholes.values() for job in jobs]
        if shard:
            self.jobs = _part(self.jobs, *shard)
        self.done = {place for place in self.wholes if place[0].point(place[1])}
        there = {job for place in self.done for job in self.wholes[place]}
        self.missing = [job for job in self.jobs if job not in there and not benches[job.bench].chip(job.setting)]
        self.floats = {bench: bench.point(FLOAT) is not None for bench in settings if bench.baseline == "quantized"}

    def complete(self, last: Job | None = None) -> list[Record]:
        """The records of settings that are complete now that the job `last` is done, each once. A setting with chips is, when all of
        its chips are measured, and its point is made of theirs here; None: those that were complete before any job, but for that."""
        found = []
        for (bench, setting), jobs in self.wholes.items():
            asked = (bench, setting) not in self.done and (last is None or last in jobs)
            if asked and all(bench.chip(job.setting) for job in jobs):
                if not bench.point(setting):
                    bench.measure(setting, wait=True)
                self.done.add((bench, setting))
                found.append(bench.record(setting))
        return found

    def settings_of(self, bench: Bench) -> list[Setting | None]:
        """The settings of a bench, the software first, of which this list has a job."""
        own = {*self.jobs}
        return [setting for (of, setting), jobs in self.wholes.items() if of is bench and own & {*jobs}]

    def chips_of(self, bench: Bench) -> list[Setting]:
        """The settings of a bench of which this list has a job, each chip by itself, and those without chips."""
        return [job.setting for job in self.jobs if self.benches[job.bench] is bench and job.setting]

    def text(self, workers: int) -> str:
        """How many points there are and are missing, and the time that these may take, judged by those there are."""
        count, missing = len(self.jobs) + len(self.floats), len(self.missing) + [*self.floats.values()].count(False)
        points = f"{count} points: "
        if not missing:
            return points + "all are measured already"
        there = count - missing
        text = points + (f"{there} {'is' if there == 1 else 'are'} measured already, " if there else "")
        text += f"{missing} to measure"
        if (each := self._seconds()) is not None:
            text += f", about {show_seconds(each * missing / workers)} ({show_seconds(each)} each so far)"
        return text

    def _seconds(self) -> float | None:
        """Mean time of the settings that were measured already, but for the software."""
        there = {*self.jobs} - {*self.missing}
        found = [point["took_s"] for job in there if job.setting
                 if (point := self.benches[job.bench].chip(job.setting))]
        return statistics.fmean(found) if found else None

    def listing(self) -> str:
        """A line for each point, or for chips of one setting in a row that are all measured, or all not."""
        missing, lines, floats = {*self.missing}, [], dict(self.floats)
        whole = {job: place for place, jobs in enumerate(self.wholes.values()) for job in jobs}

        def line(measured: bool, bench: Bench, text: str) -> None:
            name = f"{bench.settings.resume or bench.settings.model}: " if len(self.benches) > 1 else ""
            lines.append(f"{'measured  ' if measured else 'to measure'}  {name}{text}")

        for (to_measure, _), jobs in itertools.groupby(self.jobs, key=lambda job: (job in missing, whole[job])):
            first, *others = jobs
            bench = self.benches[first.bench]
            if bench in floats:
                line(floats.pop(bench), bench, "float")
            line(not to_measure, bench, f"{first}" + (f" to {others[-1].setting.chips.chip_seed}" if others else ""))
        return "\n".join(lines)


def _jobs(bench: int, setting: Setting | None, baseline: str) -> list[Job]:
    """One for each chip. All chips share histograms, unless each has ranges of its own."""
    if setting is None:
        return [Job(bench, None, (bench, None), baseline=baseline)]
    own, alone = setting.calibration.on == "chip", setting.one_by_one
    return [Job(bench, each, (bench, (reads_of(each), each.chips if own else setting.chips)), len(alone) > 1) for each in alone]


def _part(jobs: Sequence[Job], part: int, of: int) -> list[Job]:
    """The part-th of some jobs, in their order: groups are laid end to end and cut into parts of the same size."""
    by_group: dict[Hashable, list[Job]] = {}
    for job in jobs:
        if job.setting:
            by_group.setdefault(job.group, []).append(job)
    laid = [job for group in by_group.values() for job in group]
    mine = {*laid[len(laid) * (part - 1) // of:len(laid) * part // of]}
    return [job for job in jobs if job in mine or job.setting is None]


def show_seconds(seconds: float) -> str:
    """A time as people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Queue:
    """Hands jobs to workers: to each those of one group, as long as there are any, then a group that nobody has, then jobs of the largest
    one, beside the worker that has it. Jobs that another program is measuring come last."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self.groups: dict[Hashable, list[Job]] = {}
        self.busy: list[Job] = []  # which are handed out again when nothing else is left
        self.taken: set[Hashable] = set()
        for job in jobs:
            self.groups.setdefault(job.group, []).append(job)

    def take(self, last: Job | None) -> tuple[Job, bool] | None:
        """The next job of a worker, and whether to wait for another program that is measuring it; None where nothing is left.

        Args: last, the worker's last job, whose histograms it has.
        """
        left = {group: jobs for group, jobs in self.groups.items() if jobs}
        if last is not None and last.group in left:
            return left[last.group].pop(0), False
        if fresh := [group for group in left if group not in self.taken]:
            self.taken.add(fresh[0])
            return left[fresh[0]].pop(0), False
        if left:
            return max(left.values(), key=len).pop(), False
        return (self.busy.pop(0), True) if self.busy else None

    def put_back(self, job: Job) -> None:
        """The worker of this job died."""
        self.groups.setdefault(job.group, []).insert(0, job)
        self.taken.discard(job.group)
