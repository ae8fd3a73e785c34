"""Capacity's arithmetic on curves that are known by formula: which steps, knee, open loop, targets, the page."""

import json
import math

import msgspec
import numpy as np
import pytest

from loadtest.capacity import analysis, derive, explore, report, schema, scrape, sizes, stats
from loadtest.capacity.openloop import Curve, largest_rate, steady
from loadtest.capacity.schema import Delay, Estimate, Options, Report, Run, ServerSide, Step, _with_infinities

NO_WAIT = [Delay("all of it", 0.0, "test")]
OPTIONS = Options(slo_p95_ms=250)


def step(in_flight, rps, *, p95_ms=None, refused=0, **server):
    """A closed-loop step whose latency follows from Little's law."""
    mean = in_flight / rps * 1e3
    p95 = mean if p95_ms is None else p95_ms
    return Step(
        loop="closed",
        in_flight=float(in_flight),
        rps=Estimate(rps, 0.0),
        mean_ms=mean,
        p50_ms=mean,
        p95_ms=Estimate(p95, 0.0),
        p99_ms=p95,
        requests=1000,
        refused=refused,
        errors=0,
        seconds=1.0,
        stable=True,
        client_cpu_share=0.1,
        server=ServerSide(**server),
    )


def fixed(servers, seconds):
    return lambda n: step(n, min(n, servers) / seconds)


def explored(server, options=OPTIONS):
    """All steps that would be measured on this server."""
    steps = []
    while (level := explore.next_in_flight(steps, options)) is not None:
        steps.append(server(level))
    return steps


def targets(server, options=OPTIONS, waits=NO_WAIT):
    steps = explored(server, options)
    return derive.derive(steps, analysis.find(steps, [], options, local=False), options, waits)


@pytest.mark.parametrize("servers", [1, 2, 3, 5, 10, 23, 50, 77])
def test_the_knee_of_a_fixed_service_time_is_its_number_of_servers(servers):
    steps = explored(fixed(servers, 0.05))
    found = analysis.find(steps, [], OPTIONS, local=False)
    assert found.peak_rps == pytest.approx(servers / 0.05)
    assert servers * 0.9 <= found.knee_in_flight <= servers
    # c servers answer within the objective while fewer than c × 250/50 are in flight.
    assert found.objective_in_flight == pytest.approx(servers * 5, rel=0.11)


def test_steps_are_few():
    assert len(explored(fixed(77, 0.05))) <= 20


def test_the_peak_of_a_server_that_collapses_is_found_between_two_doublings():
    def server(n):
        return step(n, 1000 * (n / 24 if n <= 24 else 24 / n))

    found = analysis.find(explored(server), [], OPTIONS, local=False)
    assert found.peak_rps == pytest.approx(1000, rel=0.05)
    assert found.peak_in_flight == pytest.approx(24, rel=0.1)


def test_a_step_worse_than_a_heavier_one_is_measured_again_and_the_better_counts():
    disturbed = [step(1, 10), step(2, 20, p95_ms=900), step(4, 40), step(8, 40, p95_ms=900)]
    assert explore.next_in_flight(disturbed, OPTIONS) == 2
    again = [*disturbed, step(2, 20)]
    assert explore.next_in_flight(again, OPTIONS) != 2
    merged = explore.merge(again)
    assert merged[2].p95_ms.value == 100
    assert merged[2].repeats == 1


def test_company_on_the_machine_is_said_where_it_decides():
    steps = explored(lambda n: step(n, min(n, 4) / 0.05, cpu_cores=1.0))

    def notes(closed, opened, *, local=True):
        found = analysis.find(closed, opened, OPTIONS, local=local)
        return [note for note in found.warnings if "Other processes" in note]

    def beside(each, cores):
        return msgspec.structs.replace(each, machine_cpu_cores=1.1 + cores, offered_rps=60.0)

    quiet = [beside(each, 0.05) for each in steps]
    assert not notes(quiet, [quiet[2]])
    assert not notes([beside(steps[0], 0.9), *quiet[1:]], [quiet[2]])
    assert "up to 0.9 CPUs" in notes([beside(each, 0.9) for each in steps], [])[0]
    assert f"1 of {len(steps) + 1} steps" in notes(quiet, [beside(steps[2], 0.9)])[0]
    assert not notes(quiet, [beside(steps[2], 0.9)], local=False)


def test_exploring_ends_when_even_one_request_is_refused():
    assert explore.next_in_flight([step(1, 10, refused=5000)], OPTIONS) is None


def test_a_server_twice_as_fast_gets_twice_the_rate_target():
    slow, fast = targets(fixed(8, 0.04)), targets(fixed(8, 0.02), msgspec.structs.replace(OPTIONS, slo_p95_ms=125))
    assert fast.target_rps == pytest.approx(2 * slow.target_rps, rel=0.02)
    assert fast.target_in_flight == pytest.approx(slow.target_in_flight, rel=0.05)


def test_a_server_with_twice_the_servers_gets_about_twice_the_in_flight_target():
    small, large = targets(fixed(8, 0.04)), targets(fixed(16, 0.04))
    assert large.target_rps == pytest.approx(2 * small.target_rps, rel=0.05)
    assert 1.7 <= large.target_in_flight / small.target_in_flight <= 2.1


@pytest.mark.parametrize("growth", [0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("seconds", [0.0, 20.0, 60.0])
def test_the_target_is_never_over_the_knee_and_leaves_room_for_growth(growth, seconds):
    options = msgspec.structs.replace(OPTIONS, growth_percent_per_second=growth)
    derived = targets(fixed(10, 0.05), options, [Delay("all of it", seconds, "test")])
    assert derived.target_in_flight <= 10
    # Even if the HPA's tolerance lets the load grow by a tenth unseen, it stays within what one replica carries.
    assert derived.target_rps * 1.1 * (1 + growth / 100) ** seconds <= 10 / 0.05


def test_the_arithmetic_by_hand():
    # 90 % of 200 rps hold; 1 %/s for 50 s grow by 1.6446; 180 / 1.6446 = 109.45; / 1.1 = 99.5.
    derived = targets(fixed(10, 0.05), waits=[Delay("all of it", 50.0, "test")])
    assert derived.growth_factor == pytest.approx(1.01**50)
    assert derived.trigger_rps == pytest.approx(109.45, abs=0.01)
    assert derived.target_rps == pytest.approx(99.50, abs=0.01)
    assert [line.result for line in derived.lines[:3]] == ["180.0 rps", "50.0 s", "× 1.645"]


def test_the_time_of_a_node_is_told_apart_because_room_can_be_held():
    options = msgspec.structs.replace(OPTIONS, node_seconds=120.0)
    slow, held = (targets(fixed(10, 0.05), each, derive.delays(each, 1.0, "test")) for each in (options, OPTIONS))

    assert slow.trigger_rps == pytest.approx(held.trigger_rps / 1.01**120)
    (line,) = [line for line in slow.lines if "placeholder" in line.what]
    assert line.result == f"{held.trigger_rps:.1f} rps"
    assert not [line for line in held.lines if "placeholder" in line.what]


def test_in_flight_as_the_server_counts_it_at_that_rate_lowers_the_target_and_never_raises_it():
    steps = explored(fixed(10, 0.05))
    found, waits = analysis.find(steps, [], OPTIONS, local=False), [Delay("all of it", 50.0, "test")]

    def with_(**server):
        at_trigger = msgspec.structs.replace(step(9.0, 109.45), loop="open", server=ServerSide(**server))
        return derive.derive(steps, found, OPTIONS, waits, at_trigger)

    # 109.45 rps × 50 ms are 5.47 in flight, and some wait: the model says 5.5.
    modelled = derive.derive(steps, found, OPTIONS, waits).target_in_flight
    assert modelled == 5.0
    assert with_(in_flight=4.4).target_in_flight == 4.0
    assert with_(in_flight=7.0).target_in_flight == modelled
    assert with_().target_in_flight == modelled  # the client's 9.0
    assert "4.40 counted by the server" in with_(in_flight=4.4).lines[4].arithmetic


def test_without_a_load_within_the_objective_there_is_no_target():
    assert targets(fixed(4, 0.5)) is None


def test_when_no_rate_of_arrivals_holds_there_is_no_target_and_the_report_says_why():
    steps = explored(fixed(4, 0.05))
    late = [msgspec.structs.replace(step(9, rate, p95_ms=900), loop="open", offered_rps=rate) for rate in (70.0, 7.0)]
    found = analysis.find(steps, late, OPTIONS, local=False)
    assert found.objective_in_flight is not None
    assert found.open_loop_rps == 0
    assert any("not even 7.0 rps" in warning for warning in found.warnings)
    assert derive.derive(steps, found, OPTIONS, NO_WAIT) is None
    holding = msgspec.structs.replace(late[1], p95_ms=Estimate(60.0, 0.0))
    found = analysis.find(steps, [late[0], holding], OPTIONS, local=False)
    assert derive.limit(found)[0] == 7.0


def test_one_exponential_server_is_the_textbook_queue():
    # X(k) = 100 whatever is in flight: M/M/1 at half load has ρ/(1-ρ) = 1 in the system.
    curve = Curve.of([step(1, 100), step(64, 100)])
    assert steady(curve, 50.0).in_flight == pytest.approx(1.0, rel=1e-6)
    assert steady(curve, 80.0).in_flight == pytest.approx(4.0, rel=1e-3)


def test_four_exponential_servers_are_the_textbook_queue():
    # M/M/4, ρ = 0.75: Erlang's C is 0.5094, so 0.5094 × 0.75/0.25 wait and 3 are served.
    curve = Curve.of([step(n, min(n, 4) * 10) for n in (1, 2, 3, 4, 128)])
    assert steady(curve, 30.0).in_flight == pytest.approx(3 + 0.5094 * 3, rel=1e-3)


def test_a_bound_refuses_what_does_not_fit():
    # M/M/1 with room for one: at twice its rate two thirds are refused.
    curve = Curve.of([step(1, 100)], bound=1)
    assert steady(curve, 200.0).refused_share == pytest.approx(2 / 3)


def test_the_largest_open_loop_rate_is_below_the_closed_loops_and_meets_the_objective():
    curve = Curve.of(explored(fixed(4, 0.05)))
    rate = largest_rate(curve, 100.0)
    assert 0.5 * 80 < rate < 80
    assert steady(curve, rate).p95_ms <= 100.0
    assert steady(curve, rate * 1.05).p95_ms > 100.0


def test_intervals_of_batch_means_widen_with_likeness():
    rng = np.random.default_rng(1)
    apart = rng.exponential(1.0, 4000)
    alike = np.repeat(rng.exponential(1.0, 40), 100)
    assert stats.rate_of(alike, 1.0).relative > 3 * stats.rate_of(apart, 1.0).relative


def test_an_interval_holds_the_truth_nineteen_times_in_twenty():
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(400):
        found = stats.rate_of(rng.exponential(0.1, 500), 1.0)
        hits += abs(found.value - 10.0) <= found.half_width
    assert 0.90 <= hits / 400 <= 0.98


def test_too_few_answers_are_never_stable():
    assert math.isinf(stats.percentile(np.array([1.0, 2.0]), 95).half_width)
    assert math.isinf(stats.rate(np.array([1.0]), 0.0).half_width)


def test_an_estimate_of_which_nothing_is_known_is_read_back_as_that():
    found = json.loads(msgspec.json.encode({"value": 1.0, "half_width": math.inf}), object_hook=_with_infinities)
    assert msgspec.convert(found, Estimate) == Estimate(1.0, math.inf)


def test_metrics_of_two_readings_become_what_happened_between():
    before = scrape.parse(
        "process_cpu_seconds_total 10\ninference_batch_rows_sum 0\ninference_batch_rows_count 0\n"
        'inference_request_duration_seconds_sum{route="a"} 1\n',
        100.0,
    )
    text = (
        "process_cpu_seconds_total 13\nprocess_resident_memory_bytes 5e7\ninference_batch_rows_sum 40\n"
        'inference_batch_rows_count 10\ninference_tokens_total{kind="real"} 75\n'
        'inference_request_duration_seconds_sum{route="a"} 6\ninference_requests_in_flight 9\n'
        'inference_tokens_total{kind="padding"} 25\ninference_runners 2\ninference_runner_busy_seconds_total 3\n'
    )
    server = scrape.between(before, [], scrape.parse(text, 102.0))
    assert server.cpu_cores == 1.5
    assert server.memory_bytes == 5e7
    assert server.batch_rows == 4
    assert server.in_flight == 2.5  # five seconds spent in two, whatever the gauge says at the end
    assert server.padding_share == 0.25
    assert server.runner_busy_share == 0.75
    assert server.queue_wait_ms is None


@pytest.mark.parametrize(
    ("server", "cause"),
    [
        ({"runner_busy_share": 0.97, "runners": 2.0, "cpu_cores": 2.0}, "runners"),
        ({"runner_busy_share": 0.5, "runners": 2.0, "cpu_cores": 1.95}, "cpu"),
        ({"gpu_utilization": 0.99, "runner_busy_share": 0.95}, "gpu"),
        ({"cpu_cores": 0.3, "runners": 2.0}, "latency"),
    ],
)
def test_what_gives_out_first_is_named_with_its_evidence(server, cause):
    steps = [step(n, min(n, 4) / 0.05, **server) for n in (1, 2, 4, 8, 16, 32)]
    found = analysis.find(steps, [], OPTIONS, local=False)
    assert found.gives_out == cause
    assert "in flight" in found.gives_out_why


def test_replicas_survive_the_loss_of_one_or_of_a_zone():
    said = []

    def say(*line):
        said.append(line)

    one = Options(base_rps=1000.0, peak_rps=4000.0)
    # 1000/90 → 12 at the target; 11 left carry 1100 within the objective. 4000/90 → 45, and one more.
    assert sizes.replicas(one, 100.0, 90.0, say) == (12, 46)
    zone = msgspec.structs.replace(one, survive="zone", zones=3)
    # 15 lose 5 and keep 10 × 100 = 1000; 14 lose 5 and keep 900.
    assert sizes.replicas(zone, 100.0, 90.0, say) == (15, 60)


def test_resources_follow_what_was_used():
    steps = [
        step(n, min(n, 4) * 10, cpu_cores=min(n, 4) * 0.45, memory_bytes=100 * 2**20, runners=2.0) for n in (1, 2, 4, 8)
    ]
    request, limit, percent = sizes.cpu(steps, 40.0, 20.0, lambda *_: None)
    assert (request, limit, percent) == (1.8, 2.0, 50)
    assert sizes.memory(steps, lambda *_: None) == (128 * 2**20, 384 * 2**20)


@pytest.fixture
def made(tmp_path):
    steps = [step(n, min(n, 4) / 0.05, cpu_cores=0.4 * min(n, 4), queue_wait_ms=1.0) for n in (1, 2, 4, 8, 16, 32)]
    findings = analysis.find(steps, [], OPTIONS, local=True)
    derivation = derive.derive(steps, findings, OPTIONS, derive.delays(OPTIONS, 2.0, "test"))
    run = Run("id-1", "http://x/<script>", "now", 1.0, "machine", "texts", {"name": "sentiment"})
    return Report(run, OPTIONS, steps, [], findings, derivation)


def test_a_report_read_back_is_the_same(made, tmp_path):
    schema.write(made, tmp_path / "report.json")
    assert schema.read(tmp_path / "report.json") == made


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "not JSON"), ('{"schema_version": 99}', "99"), ("[]", "None"), ('{"schema_version": 2}', "not a capacity")],
)
def test_what_is_no_report_is_one_line_that_names_the_file(tmp_path, text, says):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(schema.ReportError) as caught:
        schema.read(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


def test_the_page_is_one_file_with_the_derivation_and_its_figures(made, tmp_path):
    written = report.write(made, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 5
    for line in made.derivation.lines:
        assert line.result in page
    assert "<script" not in page
    assert "src=" not in page
    assert {path.suffix for path in written if path.is_file()} == {".json", ".html", ".png"}
