"""The table of stages: one order and one description for every reader of a run."""

from affectgpt.stages import COLD_START, GRPO, STAGE_LABELS, in_stage_order, stage_label


def test_stages_are_ordered_as_a_run_goes_and_unknown_ones_follow() -> None:
    assert in_stage_order({"zebra": 0, "grpo": 1, "untrained": 2, "apple": 3, "cold_start": 4}) == [
        "untrained", "cold_start", "grpo", "apple", "zebra",
    ]  # fmt: skip
    assert in_stage_order(STAGE_LABELS) == list(STAGE_LABELS)


def test_one_stage_comes_before_and_one_after_and_unknown_ones_are_controls() -> None:
    roles = {role: [name for name, label in STAGE_LABELS.items() if label.role == role] for role in ("before", "after")}
    assert roles == {"before": [COLD_START], "after": [GRPO]}
    assert stage_label(GRPO) is STAGE_LABELS[GRPO]
    assert (stage_label("other_seed").title, stage_label("other_seed").role) == ("Other seed", "control")
