"""The simulated fleet: steady states, queues, delays, losses, sweeps. Times are the simulator's own."""

import random

import msgspec
import numpy as np
import pytest

from loadtest import shapes
from loadtest.capacity import analysis, derive, schema
from loadtest.capacity.schema import Estimate, Options, Report, Run, ServerSide, Step
from loadtest.shapes import ShapeError, shape
from loadtest.simulate import command
from loadtest.simulate.fleet import Fleet, World, simulate
from loadtest.simulate.hpa import Autoscaler, Behavior, Pods, Rules
from loadtest.simulate.replica import Replica
from loadtest.simulate.report import Simulation

STILL = Behavior(up=Rules(0, (), "Disabled"), down=Rules(0, (), "Disabled"))
WORLD = World(scrape_seconds=15, window_seconds=15, pending_seconds=10, start_seconds=5, noise=False)


def step(n, rps):
    mean = n / rps * 1e3
    return Step(
        loop="closed",
        in_flight=float(n),
        rps=Estimate(rps, 0.0),
        mean_ms=mean,
        p50_ms=mean,
        p95_ms=Estimate(mean, 0.0),
        p99_ms=mean,
        requests=1000,
        refused=0,
        errors=0,
        seconds=1.0,
        stable=True,
        client_cpu_share=0.1,
        server=ServerSide(cpu_cores=rps / 100),
    )


@pytest.fixture(scope="module")
def report():
    """Four servers of 40 ms: 100 rps, within 100 ms up to about ten in flight."""
    options = Options(slo_p95_ms=100.0)
    steps = [step(n, min(n, 4) / 0.04) for n in (1, 2, 3, 4, 6, 8, 9, 10, 16)]
    findings = analysis.find(steps, [], options, local=False)
    derivation = derive.derive(steps, findings, options, derive.delays(options, 3.0, "test"))
    return Report(Run("r", "u", "t", 1.0, "m", "l", {}), options, steps, [], findings, derivation)


@pytest.fixture(scope="module")
def replica(report):
    return Replica.of(report)


def test_a_fleet_of_the_right_size_is_in_steady_state_from_the_first_second(replica):
    line = simulate(replica, Autoscaler(4, 4, 2.0, STILL), WORLD, lambda _: 200.0, 300)
    assert set(line.ready) == {4}
    assert line.violation_share(100.0) == 0
    # 50 rps at each of 4: two busy on average, and a little waiting.
    assert line.in_flight[-1] / 4 == pytest.approx(2.17, abs=0.05)
    assert line.replica_hours == pytest.approx(4 * 300 / 3600)


def test_a_queue_grows_by_what_does_not_leave_and_refuses_past_its_bound(report):
    # 150 rps at a replica that answers 100: 50 more in each second, 512 after ten seconds.
    replica = Replica.of(report, bound=512)
    line = simulate(replica, Autoscaler(1, 1, 2.0, STILL), WORLD, lambda _: 150.0, 60)
    assert line.in_flight[4] == pytest.approx(250, rel=0.1)
    assert line.refused[5] == 0
    assert line.in_flight[-1] == 512
    assert line.refused[-1] == pytest.approx(50)


def test_a_queue_drains_by_what_is_left_of_the_throughput(replica):
    # Ten seconds at 150 leave 500 waiting; at 50 they take 500 / (100 - 50) = ten more.
    line = simulate(replica, Autoscaler(1, 1, 2.0, STILL), WORLD, lambda t: 150.0 if t < 10 else 50.0, 60)
    assert line.in_flight[14] == pytest.approx(250, rel=0.15)
    assert line.in_flight[25] < 5
    assert line.p95_ms[14] > 1000


def test_a_new_replica_helps_only_after_it_is_pending_and_started(replica):
    line = simulate(replica, Autoscaler(1, 2, 2.0), WORLD, lambda t: 20.0 if t < 31 else 95.0, 120)
    wanted = next(t for t, n in zip(line.seconds, line.wanted, strict=True) if n == 2)
    ready = next(t for t, n in zip(line.seconds, line.ready, strict=True) if n == 2)
    assert wanted == 45  # the first scrape and sync after the change
    assert ready == wanted + 10 + 5


def test_the_hpa_sees_pending_pods_as_ignored_and_started_ones_without_a_sample_as_missing(replica):
    fleet = Fleet(replica, WORLD, 2)
    fleet.serve(0.0, 100.0, 1.0)
    fleet.scrape(0.0, 1.0)
    fleet.resize(1.0, 5)
    assert fleet.pods(2.0, "inflight").ignored == 3
    assert fleet.pods(12.0, "inflight").missing == 3
    assert fleet.pods(12.0, "cpu").missing == 3
    fleet.serve(17.0, 100.0, 1.0)
    fleet.scrape(17.0, 1.0)
    seen = fleet.pods(17.0, "inflight")
    assert (len(seen.values), seen.missing, seen.ignored) == (5, 0, 0)


def test_lost_pods_are_made_anew_and_missed_meanwhile(replica):
    world = World(**{**vars(WORLD), "losses": ((100.0, 2),)})
    line = simulate(replica, Autoscaler(4, 4, 2.0, STILL), world, lambda _: 200.0, 200)
    assert line.ready[99] == 4
    assert line.ready[100] == 2
    assert line.ready[114] == 2
    assert line.ready[115] == 4


def test_scaling_down_takes_the_youngest_and_those_not_ready_first(replica):
    fleet = Fleet(replica, WORLD, 3)
    fleet.resize(0.0, 6)
    fleet.resize(1.0, 4)
    assert list(fleet.count) == [3, 1]
    fleet.resize(2.0, 2)
    assert list(fleet.count) == [2]


def test_a_server_that_collapses_stays_down_in_the_model_too():
    steps = [step(n, 100 * (n / 8 if n <= 8 else 8 / n)) for n in (1, 2, 4, 8, 12, 16, 32, 64)]
    options = Options(slo_p95_ms=100.0)
    findings = analysis.find(steps, [], options, local=False)
    collapsing = Report(Run("r", "u", "t", 1.0, "m", "l", {}), options, steps, [], findings, None)
    line = simulate(
        Replica.of(collapsing), Autoscaler(1, 1, 2.0, STILL), WORLD, lambda t: 200.0 if t < 10 else 60.0, 200
    )
    # 60 rps were no problem before the overload; after it throughput is below 60 for ever.
    assert line.in_flight[-1] > 100
    assert line.p95_ms[-1] > 1000


def test_thousands_of_replicas_follow_the_traffic(replica, report):
    target = report.derivation.target_in_flight
    day = shape("diurnal", 100_000, 400_000, 3600)
    line = simulate(replica, Autoscaler(1000, 20_000, target), WORLD, day.rate, day.seconds, replicas=3000)
    assert max(line.wanted) > 5000
    assert line.violation_share(100.0) < 0.01
    assert np.corrcoef(line.rps, line.ready)[0, 1] > 0.8


def test_noise_is_the_same_for_a_seed(replica):
    world = World(**{**vars(WORLD), "noise": True, "seed": 5})
    first, second = (simulate(replica, Autoscaler(2, 9, 1.0), world, lambda _: 150.0, 600) for _ in range(2))
    assert first.wanted == second.wanted


def test_arrivals_of_a_shape_come_at_its_rate_and_no_later_than_its_end():
    made, rng, at, times = shape("step", 10.0, 50.0, 100.0), random.Random(3), 0.0, []
    while (at := made.next_arrival(at, rng)) <= made.seconds:
        times.append(at)
    # 10 a second in its outer halves, 50 between; the deviation of a Poisson count is its square root.
    inside = sum(25 <= at < 75 for at in times)
    assert inside == pytest.approx(2500, abs=200)
    assert len(times) - inside == pytest.approx(500, abs=90)


@pytest.mark.parametrize("name", [name for name in shapes.NAMES if name != "csv"])
def test_shapes_stay_between_base_and_peak_and_reach_the_peak(name):
    made = shape(name, 10.0, 50.0, 100.0)
    rates = [made.rate(t) for t in range(101)]
    assert min(rates) >= 10
    assert max(rates) == pytest.approx(50)


def test_a_trace_is_read_with_straight_lines_between_its_rows(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("seconds,rate\n10,0\n20,100\n40,100\n")
    made = shape("csv", 0, 0, 0, path)
    assert made.seconds == 30
    assert [made.rate(t) for t in (0, 5, 10, 25, 99)] == [0, 50, 100, 100, 100]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1,2\nx,3\n", "row 2"),
        ("1,2\n1,3\n", "row 2"),
        ("1,-2\n", "row 1"),
        ("1,2\n", "two rows"),
        ("1,nan\n", "row 1"),
    ],
)
def test_a_bad_trace_is_one_line_that_names_file_and_row(tmp_path, text, says):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ShapeError) as caught:
        shapes.read_trace(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


def test_the_command_picks_the_cheapest_that_holds_and_draws_every_trace(report, tmp_path, capsys):
    schema.write(report, tmp_path / "report.json")
    arguments = [str(tmp_path / "report.json"), "--out", str(tmp_path / "out")]
    for name in ("day1", "day2"):
        (tmp_path / f"{name}.csv").write_text("seconds,rate\n0,100\n150,200\n300,100\n")
        arguments += ["--trace", str(tmp_path / f"{name}.csv")]
    assert command.main(arguments) == 0
    result = msgspec.json.decode((tmp_path / "out" / "simulation.json").read_bytes(), type=Simulation)
    assert result.derived_holds
    holding = [trial for trial in result.trials if trial.holds]
    assert result.best in holding
    assert result.best.replica_hours == min(trial.replica_hours for trial in holding)
    assert {trial.signal for trial in result.trials} == {"inflight", "cpu"}
    # The HPAs as the generated components have them: in flight with CPU beside it, and CPU alone.
    assert [(each.signal, each.cpu_target is None) for each in result.generated] == [("inflight", False), ("cpu", True)]
    assert (tmp_path / "out" / "simulation.html").read_text().count("<svg") == 5
    figures = {path.stem for path in (tmp_path / "out").glob("trace-*.png")}
    assert figures == {f"trace-{signal}-{name}" for signal in ("inflight", "cpu") for name in ("day1", "day2")}
    said = capsys.readouterr().out
    assert "component/inflight holds" in said
    assert "component/cpu holds" in said


def test_cpu_as_a_second_metric_scales_where_the_first_does_not(replica):
    # 90 rps on one Pod are 0.9 of its CPU request; the in-flight target is far away.
    alone, beside = (
        simulate(replica, Autoscaler(1, 9, 500.0), WORLD, lambda _: 90.0, 300, cpu_target=target)
        for target in (None, 0.5)
    )
    assert max(alone.wanted) == 1
    assert max(beside.wanted) == 2


def test_the_command_refuses_a_report_without_targets(report, tmp_path, capsys):
    schema.write(msgspec.structs.replace(report, derivation=None), tmp_path / "report.json")
    assert command.main([str(tmp_path / "report.json")]) == 2
    assert "has no targets" in capsys.readouterr().err


def test_nothing_seen_changes_nothing(replica):
    fleet = Fleet(replica, WORLD, 2)
    assert Autoscaler(1, 9, 1.0).sync(0.0, 2, fleet.pods(0.0, "inflight")) == 2
    assert fleet.pods(0.0, "inflight") == Pods(pytest.approx([]), missing=2, ignored=0)
