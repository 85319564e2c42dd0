"""Mutants of the mathematics, each of which some test has to notice: ``python -m tests.mutants [--only N ...]``.

The project is copied, one place of the copy is changed at a time, and the tests named for that place run on it. A
mutant survives where they all pass. It exits with 1 where more than three do.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import SET_ASIDE

ROOT = Path(__file__).parents[1]
MOST_SURVIVORS = 3
LONGEST = 900  # seconds of a mutant's tests; one that never ends is noticed
LEFT_OUT = (".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "site")
FAST, PLAIN = "tests/training/test_written_out.py", "tests/training/test_plain.py"
STACKED, RULES = "tests/training/test_stacked.py", "tests/scoring/test_score_rules.py"


@dataclass(frozen=True)
class Mutant:
    """A change of one place of a file, and the tests that should notice."""

    file: str
    old: str  # stands in the file once
    new: str
    tests: tuple[str, ...]


Change = tuple[str, str]  # old, new
BY_FILE: list[tuple[str, tuple[str, ...], list[Change]]] = [
    ("affcache/tasks/losses.py", ("tests/tasks/test_losses.py",), [
        ("log_probabilities.mean(-1)", "log_probabilities.sum(-1)"),
        ("(1 - own.exp()).clamp", "own.exp().clamp"),
        ("(0.5 - targets) * label_smoothing", "(1 - targets) * label_smoothing"),
        ("torch.where(labels > 0, -logits, logits)", "torch.where(labels > 0, logits, -logits)"),
        ("(margin - gaps).clamp(min=0) ** power", "(margin - gaps) ** power"),
        ("return of_units.mean(-1)", "return of_units.sum(-1) / (pairs.sum((-3, -2)) > 0).sum(-1).clamp(min=1)"),
        ("rounding = spread <= torch", "rounding = spread < 0 * torch"),
    ]),
    ("affcache/tasks/metrics.py", ("tests/tasks/test_metrics.py", "tests/tasks/test_video_statistics.py"), [
        ("_ratio(2 * right, decided + labelled)", "_ratio(right, np.maximum(decided, labelled))"),
        ("value=float(np.mean(f1))", "value=float(np.mean(f1[labelled > 0]))"),
        ("(variances > CONSTANT * squares)", "(variances > 0)"),
        ("variances[1] + (means[0] - means[1]) ** 2", "variances[1]"),
        ("there.sum(axis=0), 1)  # (C,)", "there.sum(axis=0), 1) * 0"),
        ("np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0))", "(x**2).sum(axis=0)"),
        ("[np.ma.filled(np.ma.ptp(values, axis=0), 0) > 0 for values in given]", "[True, True]"),
    ]),
    ("affcache/store/pooled.py", ("tests/store/test_pooled.py",), [
        ("values.std(axis=0, keepdims=True)", "values.std(axis=0, keepdims=True, ddof=min(1, len(values) - 1))"),
        ("np.flatnonzero(status[starts[v] : starts[v + 1]] == ENCODED)", "np.arange(starts[v + 1] - starts[v])"),
        ("embeddings[:, some].astype(np.float64)", "embeddings[:, some]"),
    ]),
    ("affcache/tasks/task.py", ("tests/training/test_whole_videos.py",), [
        ('if self.level == "frame":', "if True:"),
    ]),
    ("affcache/tasks/metrics.py", ("tests/training/test_whole_videos.py",), [
        ("np.diff(first, append=len(videos))[:, None]", "len(videos)"),
    ]),
    ("affcache/tasks/label_table.py", ("tests/tasks/test_label_table.py",), [
        ("video[order], found[order]", "video[order], found"),
        ("np.isnan(found) if isinstance(task, Values) else found < 0", "found != found"),
        ("        same &= frames[1:] == frames[:-1]", "        same &= False"),
        ("not task.low <= value <= task.high", "(value < task.low or value > task.high)"),
        ("[each[row] for row in order]", "list(each)"),
        ("are_numbers = not np.isnan", "are_numbers = False and not np.isnan"),
    ]),
    ("affcache/training/risk.py", ("tests/training/test_risk.py", "tests/training/test_objective.py"), [
        ("float(nearest) if math.isclose(tail, nearest, rel_tol=1e-12) else tail", "tail"),
        ("before = shares.cumsum(-1) - shares", "before = shares.cumsum(-1)"),
        ("at_least_tiny(tail) / present.clamp(min=1)", "at_least_tiny(tail)"),
        ("(running < limit * (1 - 1e-12))", "(running <= limit)"),
        ("gap * self.edge.unsqueeze(1), 0)", "0 * gap, 0)"),
        ("/ at_least_tiny(shares.sum(1)) / alpha", "/ losses.shape[1] / alpha"),
        ("torch.cat([now, memory[:, :keep]], dim=1)", "torch.cat([memory[:, :keep], now], dim=1)"),
    ]),
    ("affcache/training/sam.py", ("tests/training/test_sam.py", FAST), [
        ("parameter.square() * parameter.grad if", "parameter.abs() * parameter.grad if"),
        ("return parameter.grad * parameter if self.adaptive else parameter.grad", "return parameter.grad"),
        ("for p in moved]))", "for p in moved[:1]]))"),
        ("            parameter.grad = None", "            pass"),
        ("layer.track_running_stats = False", "layer.track_running_stats = True"),
    ]),
    ("affcache/training/heads.py", ("tests/training/test_heads.py",), [
        ('nonlinearity="relu"', 'nonlinearity="linear"'),
        ("nn.BatchNorm1d(hidden_width), nn.ReLU()", "nn.ReLU(), nn.BatchNorm1d(hidden_width)"),
    ]),
    ("affcache/training/objective.py", ("tests/training/test_objective.py", FAST), [
        ("task.class_of(labels)[labelled].cpu()", "task.class_of(labels[:1])[labelled[:1]].cpu()"),
        ("self.counts.double().clamp(min=1)", "self.counts.double().clamp(min=1).sqrt()"),
        ("else logits + self.adjustment", "else logits - self.adjustment"),
        ("    return one * other", "    return one"),
        ("(1 - self.term_weight) * risk", "risk"),
        ("        if first_pass:", "        if True:"),
        ("for one in group.unique()]).mean()", "for one in group.unique()]).sum()"),
        ("flat.argsort(dim=1, descending=True)", "flat.argsort(dim=1)"),
        ("[one.knobs(task)[name] for one in settings]", "[settings[0].knobs(task)[name] for one in settings]"),
    ]),
    ("affcache/training/plain.py", (FAST, PLAIN), [
        ("if settings.clip_norm:", "if settings.clip_norm and not settings.rho:"),
        ("nn.utils.clip_grad_norm_(head.parameters(), settings.clip_norm)", "pass"),
        ("adaptive=one.adaptive", "adaptive=False"),
        ("predict(self.heads, frames, self.scaler)", 'predict(self.heads, frames, Scaler())'),
        ("optimiser.perturbed(), frozen_batch_norm(head):", "optimiser.perturbed():"),
        ("gradients(first_pass=False)", "gradients(first_pass=True)"),
        ("None if frames.weights is None else frames.weights[rows]", "None"),
        ("    if not why:", "    if True:"),
    ]),
    ("affcache/training/learner.py", (FAST, "tests/training/test_learner.py", PLAIN), [
        ("if self.settings.clip_norm:", "if self.settings.clip_norm and not self.sharpness_aware:"),
        ("clip_stacked_gradients(self.heads.gradients, self.settings.clip_norm)", "pass"),
        ("adaptive = self.settings.adaptive", "adaptive = False"),
        ("predict(modules, frames, self.scaler)", 'predict(modules, frames, Scaler())'),
        ("prepared = self.scaler(embeddings)", 'prepared = Scaler()(embeddings)'),
        ("count_batch=first_pass", "count_batch=True"),
        ("(settings.lr_half_period * settings.epochs)", "settings.epochs"),
        ("torch.tensor([one.rho for one in settings])", "torch.tensor([first.rho for one in settings])"),
        ("[seed, *purpose.encode()]", "[seed]"),
    ]),
    ("affcache/training/stacked/heads.py", (STACKED,), [
        ("hidden if layer else hidden - hidden.mean(2, keepdim=True)", "hidden"),
        ("(frames / (frames - 1))", "(1)"),
        ("mean + self._own.parameters.biases", "mean"),
        ("squares = squares + factors.squared_norm()", "squares = squares + 0 * factors.squared_norm()"),
        ("above = point.transposed_product", "above = self._own.transposed_product"),
    ]),
    ("affcache/training/stacked/parts.py", (STACKED, FAST, "tests/training/test_points.py",
                                            "tests/training/test_stacked_adamw.py"), [
        ("(limit / (norm + 1e-6)).clamp(max=1)", "limit / (norm + 1e-6)"),
        ("parameters.square().mul_(gradients)", "parameters.abs().mul_(gradients)"),
        ("scaled = parameters * gradients if adaptive else gradients", "scaled = gradients"),
        ("gain = 65536 / (65536 - dropped.double())", "gain = 1 + 0 * dropped.double()"),
        ('"weight_decay": decay', '"weight_decay": weight_decays[0]'),
    ]),
    ("affcache/training/stacked/parts.py", ("tests/training/test_heads_side_by_side.py",), [
        ("torch.linalg.vector_norm(gradients, dim=1, keepdim=True)", "torch.linalg.vector_norm(gradients)"),
    ]),
    ("affcache/training/epochs.py", ("tests/training/test_epochs.py", "tests/training/test_ridge_run.py"), [
        ("not value > self.value", "not value >= self.value"),
        ("cvar(losses, settings.alpha)", "cvar(losses, 1.0)"),
        ('to("cpu", copy=True)', 'to("cpu")'),
        ("not all(math.isfinite", "not any(math.isfinite"),
    ]),
    ("affcache/training/ridge.py", ("tests/training/test_ridge.py", "tests/training/test_ridge_run.py"), [
        ("(self.eigenvalues + strength)", "(self.eigenvalues + strength * len(self.eigenvalues))"),
        ("deviation > CONSTANT * moments.mean.abs()", "deviation > 0"),
        ("2.0 * present - 1", "1.0 * present"),
        ("predict(heads, validation, self.scaler)", 'predict(heads, validation, AS_STORED)'),
        ("self.scatter.addr_(step, step, alpha=self.weight * weight / total)", "self.scatter.addr_(step, step)"),
    ]),
    ("affcache/training/data.py", ("tests/training/test_data.py", "tests/training/test_fit_limits.py"), [
        (".clamp(max=stride)", ".clamp(max=1)"),
        ("if len(cut) > 1 and cut[-1].shape[1] == 1:", "if False:"),
        ("functional.normalize(prepared, dim=-1)", "functional.normalize(prepared, dim=0)"),
        ("embeddings.sum(dim=1, dtype=torch.float32)", "embeddings[:, 0]"),
    ]),
    ("affcache/scoring/postprocess.py", ("tests/scoring/test_calibration.py", "tests/scoring/test_postprocess.py",
                                         RULES), [
        ("joined, missing = of_videos(frames, train, names)", "joined, missing = train"),
        ("fit(by(rule).probabilities, labels)", "fit(given.at(joined.rows).probabilities, labels)"),
        ("fit_temperature(by(rule).logits", "fit_temperature(given.at(joined.rows).logits"),
        ("max(WIDTHS, key=metric)", "max(reversed(WIDTHS), key=metric)"),
        ("np.log(20)", "np.log(3)"),
        ("value > best + 1e-12", "value > best - 1"),
        ("(falling[last] + falling[last + 1]) / 2", "falling[last]"),
    ]),
    ("affcache/scoring/rule.py", ("tests/scoring/test_calibration.py", "tests/scoring/test_postprocess.py", RULES), [
        ("(probabilities >= np.asarray(self.offsets))", "(probabilities > np.asarray(self.offsets))"),
        ("int(numbers.max()) + reach + 1", "int(numbers.max()) + 1"),
    ]),
    ("affcache/scoring/published.py", ("tests/prediction/test_publish.py", "tests/prediction/test_onnx.py"), [
        ("    if found != expected:", "    if False:"),
        ("len(seals) != 1 or", "len(seals) == 1 and False and"),
        ("name.startswith(HUB) and file.endswith(GRAPHS)", "file.endswith(GRAPHS)"),
        ("and one.name not in sums)", "and False)"),
    ]),
    ("affcache/prediction/model.py", ("tests/prediction/test_model.py",), [
        ("if fingerprint(found) != sha256:", "if False:"),
    ]),
    ("affcache/prediction/onnx_export.py", ("tests/prediction/test_onnx.py",), [
        ("self.network(pixels).half().float()", "self.network(pixels)"),
        ("if not difference <= CLOSE:", "if difference > 1:"),
        ("self.head(self.scaler(embeddings))", 'self.head(embeddings)'),
        ("            _forget(program.model)\n", ""),
    ]),
    ("affcache/scoring/trained.py", ("tests/prediction/test_model.py", RULES, "tests/scoring/test_score.py"), [
        ("self.scaler(embeddings.to(self.device))", 'embeddings.to(self.device).float()'),
    ]),
    ("affcache/scoring/intervals.py", ("tests/scoring/test_intervals.py",), [
        ("min(value, corrected) - reach, max(value, corrected) + reach", "corrected - reach, corrected + reach"),
        ("min(max(3 * squares.sum() ** 2 / (squares**2).sum() - 2, 1), videos - 1)", "videos - 1"),
        ("_scaled(each, limits).var(ddof=1) / seeds", "_scaled(each, limits).var(ddof=1)"),
        ("[chosen] < FEWEST_VIDEOS", "[chosen] <= FEWEST_VIDEOS"),
    ]),
    ("affcache/scoring/ensemble.py", (RULES, "tests/scoring/test_score.py", "tests/scoring/test_ensemble.py"), [
        ("return probabilities.mean(0).numpy(), task.averaged(each)",
         "return task.probabilities(each.mean(0)).numpy(), task.averaged(each)"),
        ("shares = there * np.asarray(weights or [1.0] * len(there))[:, None]", "shares = there * 1.0"),
        ("shares = np.where(shares.sum(axis=0) > 0, shares, there)", "shares = shares + 1e-9"),
        (".repeat(views, axis=0)", ".repeat(1, axis=0)"),
        ("if values[chosen] > best:", "if True:"),
        ("chosen = int(np.argmax(values))", "chosen = 0"),
    ]),
    ("affcache/store/frames.py", ("tests/store/test_joined.py", "tests/scoring/test_ensemble.py"), [
        ("np.flatnonzero(store.status[first:last] == ENCODED)", "np.arange(last - first)"),
        ("found.append(of[np.searchsorted(own, both)])", "found.append(of[: len(both)])"),
        ("there = reduce(np.logical_or, (found != ABSENT for found in each))", "there = each[0] != ABSENT"),
    ]),
    ("affcache/training/data.py", ("tests/training/test_joined_stores.py",), [
        ("step**2 * (count * len(values) / total)", "0 * step"),
        ("mean = mean.to(own) + step * (len(values) / total)", "mean = own"),
        ("return (prepared - self.mean) / self.deviation", "return prepared - self.mean"),
        ("torch.where(varies, deviation, 1.0)", "deviation"),
    ]),
    ("affcache/store/description.py", ("tests/training/test_joined_stores.py", "tests/store/test_joined.py"), [
        ("fingerprint(description) != sha256 or sum(widths) != width", "sum(widths) != width"),
        ("deciding = {SIDE_BY_SIDE: [", "deciding = {SIDE_BY_SIDE: [] and ["),
    ]),
    ("affcache/scoring/together.py", ("tests/scoring/test_ensemble.py", "tests/scoring/test_together.py"), [
        ("np.unique(group[places], return_inverse=True)", "np.arange(group.max() + 1), group[places]"),
        ("np.searchsorted(theirs.joined.rows, their_rows[both])", "np.arange(both.sum())"),
    ]),
    ("affcache/tasks/multitask.py", ("tests/tasks/test_multitask.py", "tests/training/test_multitask_training.py"), [
        ("end - part.outputs : end", "end - part.outputs : end - 1"),
        ("value=sum(one.value for one in scores)", "value=sum(one.value for one in scores) / len(scores)"),
        ("np.where(part.labelled(own), own, np.nan)", "np.where(part.labelled(own), own, 0)"),
        ("[..., part_of == one].mean(axis=-1)", "[..., part_of == one].sum(axis=-1)"),
    ]),
    ("affcache/tasks/challenge_file.py", ("tests/tasks/test_multitask.py",), [
        ("        first.sort()\n", "        first = np.arange(len(numbers))[::-1]\n"),
        ("own == task.invalid_value", "own < task.invalid_value"),
    ]),
    ("affcache/training/objective.py", ("tests/training/test_multitask_training.py",), [
        ("shares = _product(self._shares(labels, weights), labelled)", "shares = self._shares(labels, weights)"),
        ("self.settings.auc_margin, counts)", "self.settings.auc_margin)"),
        ("counts = None if labelled is None else labelled.flatten(1)", "counts = None"),
        ("[weight * part(of", "[part(of"),
    ]),
    ("affcache/training/epochs.py", ("tests/training/test_multitask_training.py",), [
        ("own in each if part.labelled(own).any()", "own in each"),
        ("sum(weight * tail for", "sum(tail for"),
    ]),
    ("affcache/training/ridge.py", ("tests/training/test_multitask_training.py",), [
        ("labelled.double()", "torch.ones_like(labelled).double()"),
    ]),
    ("affcache/scoring/ensemble.py", ("tests/scoring/test_ensemble.py",), [
        ("key=lambda one: one.stat().st_mtime, reverse=True", "key=lambda one: one.stat().st_mtime"),
        ("if other == head)", "if True)"),
        ("sorted(ours) == sorted(theirs)", "True"),
    ]),
    ("affcache/scoring/predict.py", ("tests/scoring/test_ensemble.py",), [
        ("return given[own[places.index(number)]]", "return alike[places.index(number)]"),
    ]),
    ("affcache/scoring/postprocess.py", ("tests/scoring/test_ensemble.py",), [
        ("has & set(every) - set(own)", "set(every) - set(own)"),
        ("if all(each) and not any(", "if not any("),
    ]),
    ("affcache/store/prefetch.py", ("tests/store/test_joined.py",), [
        (" | (np.diff(rows) < 0)", ""),
        ("first += part.width", "first = part.width"),
    ]),
    ("affcache/scoring/predict.py", (RULES, "tests/scoring/test_score.py"), [
        ("wanted[videos] & (np.asarray(frames.status) == ENCODED)", "wanted[videos]"),
    ]),
    ("affcache/ablation/summary.py", ("tests/ablation/test_summary.py", "tests/ablation/test_ablate.py"), [
        ("statistics.stdev(values)", "statistics.pstdev(values)"),
        ("[base[seed] for seed in seeds]", "list(base.values())[: len(seeds)]"),
        ("self.count >= FEW_SEEDS", "self.count >= 1"),
        ("return cls(value, best.value,", "return cls(best.value, best.value,"),
    ]),
    ("affcache/ablation/ablate.py", ("tests/ablation/test_ablate.py",), [
        ('"to choose by", listener, select=True', '"to choose by", listener, select=False'),
        ("not selected > before", "not selected < before"),
    ]),
    ("affcache/ablation/folds.py", ("tests/ablation/test_folds.py",), [
        ("(fold + 1) % count if choosing else fold", "fold"),
        ("(fold_of != fold) & (fold_of != chosen_on)", "fold_of != fold"),
        ("rows, probabilities = rows[order], probabilities[order]", "rows = rows[order]"),
    ]),
    ("affcache/ablation/result.py", ("tests/ablation/test_folds.py",), [
        ("curves.mean(axis=0).argmax()) + 1", "curves.mean(axis=0).argmax())"),
    ]),
    ("affcache/tasks/splits.py", ("tests/tasks/test_folds.py",), [
        ("stripped_name(video), set()", "video, set()"),
        ("own * (2 * apart + own)", "own * (apart + own)"),
        ("<= (empty := sizes == 0).sum()", "< (empty := sizes == 0).sum()"),
    ]),
    ("affcache/ablation/train.py", ("tests/ablation/test_ablate.py",), [
        ("run.run(splits.train, splits.selection)", "run.run(splits.train, splits.validation)"),
    ]),
    ("affcache/training/fit.py", (FAST, "tests/ablation/test_ablate.py"), [
        ("ClassCounts.of(splits.task, splits.train.labels)", "ClassCounts.of(splits.task, splits.train.labels[:1])"),
    ]),
    ("affcache/training/splits.py", ("tests/ablation/test_ablate.py",), [
        ("return replace(self, train=train, selection=", "return replace(self, selection="),
    ]),
    ("benchmarks/fit.py", ("tests/benchmarks/test_benchmarks.py",), [
        ("for _ in range(count):", "for _ in range(count // 2):"),
        ("for second_pass in (False, True):", "for second_pass in (True,):"),
        ("                if layer:\n", "                if False:\n"),
        ('statistics.median(b / a for a, b in zip(times["step"], published',
         'statistics.median(a / b for a, b in zip(times["step"], published'),
    ]),
    ("affcache/faces/align.py", ("tests/faces/test_align.py",), [
        ("centred.conj()", "centred"),
        ("(TEMPLATE + 0.5) * scale - 0.5", "TEMPLATE * scale"),
        ("(first + (times - 1) / 2)", "first"),
        ("if scale <= 0.5:", "if False:"),
        ("(0.5 - left) * scale - 0.5", "-left * scale"),
    ]),
    ("affcache/faces/tracks.py", ("tests/faces/test_tracks.py",), [
        ("linear_sum_assignment(-found)", "linear_sum_assignment(found)"),
        ("min(time - GAP, self._before)", "time - GAP"),
        ("not (b < c or d < a)", "a <= d and c <= b"),
        ("    person.times += track.times\n", ""),
        ("-likeness[alike]", "likeness[alike]"),
    ]),
    ("affcache/faces/media.py", ("tests/faces/test_frames.py",), [
        ("pixels.swapaxes(0, 1), c, b", "pixels.swapaxes(0, 1), b, c"),
        ("_ends_early(stream, packets, end - first)", "True"),
    ]),
    ("affcache/prediction/outputs.py", ("tests/prediction/test_predict.py",), [
        ("back = np.argsort(order)", "back = order"),
        ("one.say(own, persons[rows], frames", "one.say(own, np.zeros_like(persons[rows]), frames"),
        ("whole[rows] = column", "whole[np.sort(rows)] = column[::-1]"),
    ]),
    ("affcache/prediction/predict.py", ("tests/prediction/test_predict.py",), [
        ("np.asarray(work.said, np.int64) + first", "np.asarray(work.said, np.int64)"),
        ("[media for media in inputs.media if media.name not in self.known]", "list(inputs.media)"),
    ]),
    ("affcache/scoring/trained.py", ("tests/prediction/test_model.py",), [
        ("-len(prepared) % CALL", "0"),
    ]),
    ("affcache/prediction/model.py", ("tests/prediction/test_multitask_prediction.py",), [
        ("_decided(of, one.task, one.rule)", "_decided(of, one.task, None)"),
    ]),
    ("affcache/prediction/outputs.py", ("tests/prediction/test_multitask_prediction.py",), [
        ("tuple(weights[number] for number in numbers)", "tuple(weights)[: len(numbers)]"),
    ]),
    ("affcache/reporting/panels/timelines.py", ("tests/reporting/test_multitask_report.py",), [
        ("plain(np.where(labelled, said.labels, 0))", "plain(said.labels)"),
    ]),
]  # fmt: skip
MUTANTS = [Mutant(file, old, new, tests) for file, tests, changes in BY_FILE for old, new in changes]


def passes(copy: Path, tests: tuple[str, ...]) -> bool:
    """Run tests in a copy of the project; return whether they all pass."""
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", f"not ({SET_ASIDE})"]
    words = [sys.executable, "-m", "pytest", *tests, *options]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1):  # nothing was tested
        raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def survives(mutant: Mutant, copy: Path) -> bool:
    """Apply a mutant to a copy of the project, run its tests, and undo it; return whether they all pass."""
    path = copy / mutant.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        return passes(copy, mutant.tests)
    finally:
        path.write_text(text, encoding="utf-8")


def main() -> int:
    """Try all mutants, or those that are named by their numbers."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", type=int, metavar="N", help="numbers of mutants, from 1")
    numbers = parser.parse_args().only or range(1, len(MUTANTS) + 1)
    chosen = [(number, MUTANTS[number - 1]) for number in numbers]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        if not passes(copy, tuple(dict.fromkeys(test for _, mutant in chosen for test in mutant.tests))):
            raise SystemExit("The tests fail without a mutant: mend that first.")
        for number, mutant in chosen:
            survived = survives(mutant, copy)
            survivors += survived
            word = "SURVIVED" if survived else "noticed"
            print(f"{number:3} {word:8} {mutant.file}: {mutant.old.strip()} -> {mutant.new.strip()}", flush=True)
    print(f"{survivors} of {len(chosen)} survived")
    return int(survivors > MOST_SURVIVORS)


if __name__ == "__main__":
    sys.exit(main())
