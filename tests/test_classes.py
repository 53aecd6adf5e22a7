"""Which row of the class head a class has, and cutting the head to the classes that are kept."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rfdetr.classes import (
    COCO_NAMES,
    COCO_ROWS,
    ClassTable,
    assign_rows,
    background_row,
    coco_table,
    keep_class_rows,
    keep_classes,
)
from rfdetr.console import UserError
from rfdetr.models.detector import Detector
from rfdetr.weights import checkpoint

UNUSED = [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]  # COCO's category ids without a category


def test_coco_names_are_the_eighty_of_coco():
    assert len(COCO_NAMES) == 80 and COCO_NAMES[1] == "person" and COCO_NAMES[90] == "toothbrush"
    assert COCO_NAMES[13] == "stop sign" and COCO_NAMES[84] == "book"
    assert sorted(set(range(1, 91)) - set(COCO_NAMES)) == UNUSED


def test_coco_names_train_on_their_own_rows_and_others_on_unused_ones():
    table = assign_rows(["cells", "dog", "vessel", "person"], [3, 5, 8, 9], "coco91")
    assert table.rows == (12, 18, 26, 1)
    assert (table.rows_total, table.background) == (91, 0)
    assert table.ids == (3, 5, 8, 9)  # the dataset's own ids, which say nothing of rows


def test_free_coco_rows_come_next_and_then_the_head_grows():
    names = ["person", *(f"kind {i}" for i in range(11))]
    table = assign_rows(names, list(range(12)), "coco91")
    assert table.rows == (1, *UNUSED, 2)  # bicycle's row: the dataset has none
    many = assign_rows([f"kind {i}" for i in range(95)], list(range(95)), "coco91")
    assert many.rows_total == 96 and many.rows[-5:] == (91, 92, 93, 94, 95)
    assert many.background == 0 and not many.background_last


def test_a_dataset_head_has_a_background_row_last():
    table = assign_rows(["a", "b"], [4, 9], "dataset")
    assert (table.rows, table.rows_total, table.background, table.background_last) == (
        (0, 1),
        3,
        2,
        True,
    )


NAMES = st.lists(
    st.sampled_from(list(COCO_NAMES.values())) | st.text("abcxyz", min_size=1, max_size=4),
    min_size=1, max_size=130, unique=True,
)  # fmt: skip


@given(NAMES, st.sampled_from(["coco91", "dataset"]))
def test_rows_never_clash_and_leave_the_background_free(names, head):
    table = assign_rows(names, list(range(len(names))), head)
    assert len(set(table.rows)) == len(names)
    assert all(0 <= row < table.rows_total for row in table.rows)
    assert table.background not in table.rows and 0 <= table.background < table.rows_total
    if head == "coco91":
        own = {name: row for row, name in COCO_NAMES.items()}
        assert all(own[name] == row for name, row in zip(names, table.rows) if name in own)
        assert table.rows_total >= COCO_ROWS
    assert ClassTable.from_dict(table.to_dict()) == table


@given(NAMES, st.randoms())
def test_another_order_of_the_classes_changes_no_row(names, random):
    table = assign_rows(names, list(range(len(names))), "coco91")
    shuffled = random.sample(names, len(names))
    again = table.in_order_of(shuffled, list(range(len(names))), "there")
    assert dict(zip(again.names, again.rows)) == dict(zip(table.names, table.rows))
    assert again.names == tuple(shuffled)


def test_other_names_are_an_error_that_names_both():
    table = assign_rows(["cells", "vessel"], [1, 2], "dataset")
    with pytest.raises(UserError, match="'tubule'") as error:
        table.in_order_of(["cells", "tubule"], [1, 2], "dataset/train")
    assert "'vessel'" in str(error.value) and "dataset/train" in str(error.value)
    with pytest.raises(UserError):
        table.in_order_of(["cells"], [1], "there")


def test_names_that_have_nothing_in_common_are_said_once():
    table = assign_rows(["cells", "vessel"], [1, 2], "dataset")
    with pytest.raises(UserError) as error:
        table.in_order_of(["car", "dog"], [1, 2], "there")
    assert [str(error.value).count(f"'{name}'") for name in ("cells", "dog")] == [1, 1]


def test_a_head_that_was_cut_to_some_classes_is_said_how_to_have_all():
    table = assign_rows(["cells"], [1], "dataset")
    with pytest.raises(UserError, match=r"shrink_head\.py --keep left them out, run it again"):
        table.in_order_of(["cells", "vessel"], [1, 2], "there")


def test_a_coco_checkpoint_serves_a_dataset_with_some_of_its_classes():
    table = coco_table().in_order_of(["dog", "cat"], [7, 8], "there")
    assert table.rows == (18, 17) and table.ids == (7, 8)


def test_names_that_are_not_there_get_near_matches():
    table = assign_rows(["cells", "blood_vessel", "glomerulus"], [1, 2, 3], "coco91")
    with pytest.raises(UserError, match="'glomeruli' .did you mean 'glomerulus'"):
        keep_classes(table, ["cells", "glomeruli"])
    with pytest.raises(UserError, match="Its classes are 'cells', 'blood_vessel', 'glomerulus'"):
        keep_classes(table, ["zzz"])
    with pytest.raises(UserError, match="repeats cells"):
        keep_classes(table, ["cells", "cells"])
    with pytest.raises(UserError, match="empty"):
        keep_classes(table, [])


def test_the_background_is_copied_from_a_row_without_a_class():
    assert background_row(coco_table()) == 0
    listed = ClassTable(
        ("a", "b"), (0, 1), (0, 1), 3, None
    )  # a file that was fine-tuned with the package
    assert background_row(listed) == 2
    with pytest.raises(UserError, match="none is left"):
        background_row(ClassTable(("a", "b"), (0, 1), (0, 1), 2, None))


@given(st.lists(st.integers(0, 8), min_size=1, max_size=9, unique=True))
def test_kept_rows_are_copied_bit_for_bit_in_their_order(rows):
    state = {
        "class_embed.0.weight": torch.randn(9, 4),
        "class_embed.0.bias": torch.randn(9),
        "transformer.enc_out_class_embed.1.weight": torch.randn(9, 4),
        "bbox_embed.0.layers.0.weight": torch.randn(9, 4),
    }
    cut = keep_class_rows(state, rows)
    for name in state:
        expected = (
            state[name]
            if name.startswith("bbox")
            else torch.stack([state[name][row] for row in rows])
        )
        assert torch.equal(cut[name], expected)


def test_rows_outside_the_head_are_refused():
    with pytest.raises(ValueError, match="9 rows"):
        keep_class_rows({"class_embed.0.bias": torch.randn(9)}, [3, 9])


# ---------------- logits before and after


@pytest.fixture
def wide(small_size) -> dict:
    """A checkpoint with a 91-row head and classes on some of its rows; its EMA is another model."""
    torch.manual_seed(0)
    table = assign_rows(["cells", "dog", "vessel"], [1, 2, 3], "coco91")
    # 4 x 8 tokens on a 64-pixel side and 10 queries: the ranking matters
    models = [Detector(small_size, table.rows_total, groups=1) for _ in range(2)]
    for model in models:
        with torch.no_grad():
            for head in [model.class_embed[0], *model.transformer.enc_out_class_embed]:
                head.weight.normal_(std=0.5)
    content = checkpoint.make_content(
        "detector", small_size, 64, table, None, models[0].state_dict()
    )
    return content | {"ema": models[1].state_dict(), "size": asdict(small_size)}


def set_proposal_bias(content: dict, rows: list[int], value: float) -> None:
    for name, tensor in content["model"].items():
        if "enc_out_class_embed" in name and name.endswith("bias"):
            tensor[rows] = value


def outputs_of(content: dict, images: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    model, table = checkpoint.build_model(content)
    with torch.inference_mode():
        return model(images)["pred_logits"], [
            table.rows[table.names.index(n)] for n in ("vessel", "cells")
        ]


def test_every_head_and_the_average_are_cut_alike(wide):
    small = checkpoint.shrink(wide, ["vessel", "cells"])
    rows = [26, 12, 0]
    for key in ("model", "ema"):
        heads = [name for name in wide[key] if "class_embed" in name]
        assert len(heads) == 4
        for name, tensor in wide[key].items():
            assert torch.equal(small[key][name], tensor[rows] if name in heads else tensor), name
    ids = keep_classes(checkpoint.table_of(wide), ["vessel", "cells"]).ids
    assert small["classes"] == ClassTable(("vessel", "cells"), ids, (0, 1), 3, 2).to_dict()


def test_kept_logits_are_equal_while_the_ranking_is(wide):
    dropped = [row for row in range(91) if row not in (26, 12)]
    set_proposal_bias(wide, dropped, -100.0)  # what goes never claimed a proposal
    images = torch.randn(2, 3, 64, 64)
    before, rows = outputs_of(wide, images)
    after, new_rows = outputs_of(checkpoint.shrink(wide, ["vessel", "cells"]), images)
    torch.testing.assert_close(before[..., rows], after[..., new_rows], atol=1e-5, rtol=1e-5)


def test_a_confident_class_that_is_dropped_moves_scores(wide):
    set_proposal_bias(wide, [18], 5.0)  # the dog ranks every proposal by its own score
    images = torch.randn(2, 3, 64, 64)
    before, rows = outputs_of(wide, images)
    after, new_rows = outputs_of(checkpoint.shrink(wide, ["vessel", "cells"]), images)
    assert (before[..., rows] - after[..., new_rows]).abs().max() > 1e-3


def test_the_background_row_neither_ranks_nor_results(wide):
    small = checkpoint.shrink(wide, ["vessel", "cells"])
    images = torch.randn(1, 3, 64, 64)
    before, rows = outputs_of(small, images)
    for name, tensor in small["model"].items():
        if "class_embed" in name and name.endswith("bias"):
            tensor[-1] = 50.0
    after, _ = outputs_of(small, images)
    assert torch.equal(before[..., rows], after[..., rows])
    assert checkpoint.table_of(small).background not in rows
