"""ImageNet's class names beside timm's list."""

import pytest
from timm.data import ImageNetInfo

import imagenet_names
from storage import UserError


def test_the_table_is_timms_in_timms_order():
    info = ImageNetInfo()
    ours = [(identifier, ", ".join(names)) for identifier, names in imagenet_names.CLASSES]
    assert ours == [(info.label_names()[i], info.index_to_description(i)) for i in range(1000)]


def test_every_name_finds_its_class_unless_several_share_it():
    shared = 0
    for index, (identifier, names) in enumerate(imagenet_names.CLASSES):
        assert imagenet_names.find(identifier) == index
        for name in names:
            try:
                assert imagenet_names.find(name.upper()) == index
            except UserError as error:
                shared += 1
                assert str(index) in str(error)
    assert shared == 2 * 19


@pytest.mark.parametrize(
    "text", ["giant panda", "Giant_Panda", " coon  bear", "ailuropoda-melanoleuca", "n02510455"]
)
def test_synonyms_case_and_separators_are_understood(text):
    assert imagenet_names.find(text) == 388


def test_a_name_of_two_classes_names_both():
    both = r"'Crane' is 134 \(n02012849: crane\) or 517 \(n03126707: crane\); give the number"
    with pytest.raises(UserError, match=both):
        imagenet_names.find("Crane")


@pytest.mark.parametrize(
    "text, near",
    [
        ("giant pand", r"giant panda \(388\)"),
        ("retriever", r"golden retriever \(207\)"),
        ("gold fish", r"goldfish \(1\)"),
        ("zzzz", "give an index from 0 to 999"),
        ("", "give an index from 0 to 999"),
    ],
)
def test_unknown_names_get_near_ones(text, near):
    with pytest.raises(UserError, match=f"class '{text}' is not a name in ImageNet-1k; .*{near}"):
        imagenet_names.find(text)
