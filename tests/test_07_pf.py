"""Script 07 as a whole, its pictures, and each of its verdicts made to fall by taking out what it rests on."""

from pathlib import Path

import pytest
from helpers import ROOT, changed, check_whole, evaluate

SCRIPT = ROOT / "07_pf_performance.py"

# What makes an item shorter without touching what its verdicts rest on.
SHORTER = {
    "PF-01": [
        ("ROUNDS, STEPS = 8, 26", "ROUNDS, STEPS = 3, 26"),
        ("LONG = 1000", "LONG = 300"),
        ("    yield await untuned(lab)\n", ""),
    ],
    "PF-02": [
        ("LARGEST = 3_000", "LARGEST = 500"),
        ("10: 3, 100: 2, 1000: 1}", "10: 1, 100: 1, 1000: 1}"),
        ("for turn in range(2):\n        found.alone", "for turn in range(1):\n        found.alone"),
        ("300 if best", "60 if best"),
    ],
    "PF-03": [
        ("100 * MB", "11 * MB"),
        ("for _ in range(5):\n        for name, size", "for _ in range(2):\n        for name, size"),
    ],
}


def test_the_whole_script(tmp_path: Path) -> None:
    verdicts = evaluate(SCRIPT, tmp_path, seconds=900)
    check_whole(verdicts)
    # Each limit of the platform is still there: one that is no longer seen has been mended. Whether the
    # poll limit of an untuned server is felt depends on how fast this machine is without it.
    assert verdicts.evidence("PF-01", "limit")[0]["held"]
    assert [one["held"] for one in verdicts.evidence("PF-02", "limit")] == [True, True]
    assert [one["held"] for one in verdicts.evidence("PF-03", "limit")] == [True, True]


@pytest.mark.all
def test_the_pictures(tmp_path: Path) -> None:
    script = changed(SCRIPT, tmp_path, *SHORTER["PF-02"], *SHORTER["PF-01"])
    assert evaluate(script, tmp_path, "PF-01", "PF-02", "PF-03", "--plot", seconds=600).code == 0
    pictures = sorted(tmp_path.glob("docs/*"))
    assert [one.name for one in pictures] == ["pf_fanout.svg", "pf_latency.svg", "pf_payload.svg"]
    for one in pictures:
        text = one.read_text(encoding="utf-8")
        assert text.startswith("<?xml")
        assert "<dc:date>" not in text, "the same data give the same file"


# (item, text in the script, what stands there instead, stars then: None where nothing is proven any more)
FALLS = [
    # The local activity becomes an ordinary one: twice as many activities, and no marker is written.
    ("PF-01", "workflow.execute_local_activity(step", "workflow.execute_activity(step", 1),
    # A platform on which long runs get slower.
    ("PF-01", "        taken += 1", "        taken += 1\n        if workflow.info().get_current_history_length() > 999:"
     "\n            await workflow.sleep(0.03)", 3),
    # A sleep of half the length is measured as such.
    ("PF-01", "await asyncio.sleep(one.seconds)", "await asyncio.sleep(one.seconds / 2)", None),
    # A server whose timestamps run at half the speed.
    ("PF-01", "/ 1e9", "/ 2e9", 3),
    # One activity runs twice, though the result says nothing of it.
    ("PF-02", "    await asyncio.sleep(job.seconds)", "    await asyncio.sleep(job.seconds)\n"
     "    if job.number == 50:\n        note(job.ledger, '50 0')", 1),
    # The part of one child gets lost.
    ("PF-02", "in await asyncio.gather(*parts) for", "in (await asyncio.gather(*parts))[1:] for", 3),
    # Work that does not wait for anybody needs no fan-out.
    ("PF-02", "    await asyncio.sleep(job.seconds)", "    await asyncio.sleep(0)", None),
    # One worker process, however many are asked for.
    ("PF-02", "for _ in range(count)", "for _ in range(1)", 3),
    # The activity is given other data than the workflow.
    ("PF-03", 'f"{len(data)} {digest(data)}")\n    return', 'f"{len(data)} {digest(data[1:])}")\n    return', 1),
    # The worker's own check stays on: the workflows hang.
    ("PF-03", "task_queue=trusting, disable_payload_error_limit=True", "task_queue=trusting", 3),
    # Something of the plain text stays beside the sealed one.
    ("PF-03", '"encryption-key-id": name}', '"encryption-key-id": name, "hint": payload.data}', 3),
    # The messages of failures are not given to the codec.
    ("PF-03", "        failure_converter_class=DefaultFailureConverterWithEncodedAttributes,\n", "", 3),
    # The key is not rotated.
    ("PF-03", 'both = encrypted(keys, "february")', 'both = encrypted(keys, "january")', 3),
    # The wrong key is the right one.
    ("PF-03", '{"january": AESGCM.generate_key(256)}', '{"january": keys["january"]}', None),
    # The driver leaves a copy in the history.
    ("PF-03", '{"sha256": name}', '{"sha256": name, "copy": "x" * 30_000}', 3),
]  # fmt: skip


@pytest.mark.all
@pytest.mark.parametrize(("item", "old", "new", "stars"), FALLS)
def test_the_verdict_falls(tmp_path: Path, item: str, old: str, new: str, stars: int | None) -> None:
    script = changed(SCRIPT, tmp_path, (old, new), *SHORTER[item])
    verdicts = evaluate(script, tmp_path, item, seconds=400)
    assert verdicts.stars(item) == stars, verdicts.out
    assert verdicts.code == (1 if stars is None else 0)
