"""Tests compute on one thread: their tensors are tiny, and two threads would wait for each other.

Pictures are drawn where a test looks at them: where it is marked `pictures`. Elsewhere their files are blank.
"""

import gc
import os
import re

import pytest

from tests import pictures

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for torch, which is imported later, and for all subprocesses


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "pictures: looks at files of pictures, so they are drawn; elsewhere they are blank"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    pictures.leave_out()
    pictures.looked_at = item.get_closest_marker("pictures") is not None


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What was imported and collected stays: the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


# Proofs of many seconds with a quicker sibling among the others, which would fail as well if the thing were wrong.
SLOW = re.compile(
    "|".join(
        (
            r"test_steps.py::test_where_a_part_cannot_be_captured_the_rest_is\[data[1-3]",
            r"test_steps.py::test_a_whole_step_is_the_step\[(adamw|adam-l2|adam-one-cycle|within the limit)",
            r"test_tempering.py::test_captured_steps_read_the_weight_anew\[(trace-(?!a number)|objective-(?!a function)|"
            r"mean field-(?!steps))",
            r"test_studies.py::test_each_posterior_trains_or_is_refused\[(nsf|coupling|maf|sylvester|mixture)\]",
            r"test_app_cli.py::test_every_kind_of_part_goes_through_the_command\[argv[123]\]",
            r"test_standardize.py::test_(wine_fits_out_of_the_box|the_command_leaves_a_table_alone_where_told)",
            r"test_vae.py::test_under_a_default_of_doubles_all_is_double\[(mixture|vamp)\]",
            r"test_compiled.py::test_auto_calls_the_compiler_where_the_time_ahead_pays_for_it\[0.0-True\]",
            r"test_estimates.py::test_(the_jackknife_sees_the_bias|the_curve_is_that_of_fresh_runs)",
            r"test_compare.py::test_on_a_dask_cluster_of_two_workers_with_one_killed_midway",
            r"test_judge.py::test_(a_spoilt_encoder_is|the_command_evaluates_with_a_refined_guide|planted_too_small_a_number_of_samples)",
            r"test_judge.py::test_without_a_larger_number_of_samples_the_jackknife_says_what_is_lacking",
            r"test_tiny_data.py::test_a_folder_of_a_few_images_goes_through_every_command\[5\]",
            r"test_docs.py::test_(the_frozen_study_of_a_researcher|own_photos_from_a_folder_to_a_page)",
            r"test_app_first_hour.py::test_the_second_view_separates_the_digits",
            r"test_app_first_hour.py::test_a_captured_fit_goes_on_from_a_sparing_checkpoint_to_the_bit\[options1\]",
            r"test_programs.py::test_nuts_on_one_image_finds_the_exact_posterior",
            r"test_refined.py::test_every_loss_trains_base_guide_and_model\[SemiAmortized\]",
        )
    )
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW.search(item.nodeid):
            item.add_marker(pytest.mark.slow)
