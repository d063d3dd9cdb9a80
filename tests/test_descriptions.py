"""Files of sentences in the forms that the papers publish, made here."""

import json
import warnings

import pytest
import torch
import torch.nn.functional as F

from promptkit.data import load_dataset
from promptkit.descriptions import (
    Texts,
    as_many,
    by_class,
    descriptions_for,
    file_in,
    key_of,
    read_descriptions,
    sentence_features,
    sentences_of,
)
from promptkit.errors import InputError

CLASSES = ["yin_yang", "Apply_Eye_Makeup", "2012 Audi TTS Coupe", "sphynx", "707-320"]
# Keys as in each collection: CuPL's and ProText's differ from the classes in case and
# underscores and describe more; CoPrompt's have blanks; AWT's are the classes' own.
CUPL = {
    "background": ["There is no background."],
    "sphynx": ["The Sphynx is hairless.", " It has large ears."],
    "yin_yang": ["A yin yang is a circle.", "\n\nIt is black and white."],
    "Apply Eye Makeup": ["A person holds a brush."],
    "2012 Audi TTS Coupe": ["The car has  two doors."],
    "707-320": ["A 707-320 has four engines."],
}
COPROMPT = {name.replace("_", " "): [f"A {name}."] * 3 for name in reversed(CLASSES)}
AWT = {name: [f"sentence {i} about it." for i in range(50)] for name in CLASSES}
KAPT = {name: f"{name} is a thing. It is {i} years old." for i, name in enumerate(AWT)}
DESCRIPTORS = {**dict.fromkeys(CLASSES, ["four legs", "a tail"]), "sphynx": []}


def write(folder, name, content):
    path = folder / name
    path.write_text(json.dumps(content, indent=4), encoding="utf-8")
    return path


@pytest.mark.filterwarnings("ignore:.*also describes")
@pytest.mark.parametrize("said", [CUPL, COPROMPT, AWT, KAPT])
def test_every_collection_fits_the_classes(said, tmp_path):
    path = write(tmp_path, "said.json", said)
    found = descriptions_for(path, CLASSES)
    assert list(found) == CLASSES
    for name, key in zip(CLASSES, key_of(said, CLASSES), strict=True):
        texts = said[key] if isinstance(said[key], list) else [said[key]]
        assert found[name] == [" ".join(text.split()) for text in texts]
    assert list(read_descriptions(path)) == list(said)  # in its own order


def test_what_describes_no_class_is_said(tmp_path):
    path = write(tmp_path, "said.json", CUPL)
    with pytest.warns(UserWarning, match="describes what is no class here: 'backgro"):
        descriptions_for(path, CLASSES)


def test_visual_descriptors_may_be_missing(tmp_path):
    path = write(tmp_path, "descriptors_pets.json", DESCRIPTORS)
    assert read_descriptions(path, empty=True) == DESCRIPTORS
    blank = write(tmp_path, "blank.json", DESCRIPTORS | {"sphynx": [""]})
    assert read_descriptions(blank, empty=True) == DESCRIPTORS
    for file in (path, blank):
        with pytest.raises(InputError, match="'sphynx' must have a list of sentences"):
            descriptions_for(file, CLASSES)
    with pytest.raises(InputError, match="'707-320' must have a list"):
        odd = write(tmp_path, "odd.json", DESCRIPTORS | {"707-320": [3]})
        read_descriptions(odd, empty=True)


@pytest.mark.parametrize(
    ("dataset", "file"),
    [
        ("imagenet", "CuPL_image_prompts.json"),
        ("caltech101", "cal_prompts_full.json"),
        ("oxford_pets", "pets_prompts_full.json"),
        ("stanford_cars", "cars_prompts_full.json"),
        ("oxford_flowers", "flower_prompts_full.json"),
        ("food101", "food_prompts_full.json"),
        ("fgvc_aircraft", "airplane_prompts_full.json"),
        ("sun397", "sun_prompts_full.json"),
        ("dtd", "texture_prompts_full.json"),
        ("eurosat", "EuroSAT.json"),
        ("ucf101", "ucf_prompts_full.json"),
        ("caltech101", "caltech_prompt.json"),
        ("fgvc_aircraft", "fgvc_prompt.json"),
        ("imagenetv2", "imagenetv2_prompt.json"),
        ("imagenet_r", "imagenet_prompt.json"),
        ("oxford_pets", "descriptors_pets.json"),
        ("my_birds", "my birds.json"),
    ],
)
def test_the_file_about_a_dataset(dataset, file, tmp_path):
    assert file_in(tmp_path, dataset) is None
    for other in ("bird_prompts_full.json", "notes.txt", "res45_prompts_full.json"):
        write(tmp_path, other, {})
    assert file_in(tmp_path, dataset) is None
    assert file_in(write(tmp_path, file, {}).parent, dataset) == tmp_path / file
    write(tmp_path, f"{dataset}.json" if file[0] != "E" else "eurosat_prompt.json", {})
    if dataset != "imagenet_r" and f"{dataset}.json" != file:
        with pytest.raises(InputError, match=f"about {dataset}: name the file"):
            file_in(tmp_path, dataset)


def test_a_folder_describes_each_dataset_by_its_own_file(tmp_path):
    pets = {name: [f"{name} purrs"] for name in load_dataset("pets").classnames}
    write(tmp_path, "pets_prompts_full.json", pets)
    assert load_dataset("pets", descriptions=tmp_path).descriptions == pets
    own = load_dataset("sat").descriptions
    with pytest.warns(UserWarning, match="has no file about sat, which stays without"):
        assert load_dataset("sat", descriptions=str(tmp_path)).descriptions == own


def test_sentences_of_the_mini_world_say_what_is_seen():
    dataset = load_dataset("pets")
    said = sentences_of(dataset)
    for name, facts in dataset.descriptions.items():
        assert said[name][0] == f"a photo of a {name}, a type of pet with {facts[0]}."
        assert len(said[name]) == len(facts) + 1
        assert all(fact in said[name][-1] for fact in facts)
    assert sentences_of(None) == {}


def test_the_same_number_for_each_class():
    said = {"a": ["1", "2", "3"], "b": ["4", "5"]}
    assert as_many(said) == {"a": ["1", "2"], "b": ["4", "5"]}
    assert as_many(said, 3) == {"a": ["1", "2", "3"], "b": ["4", "5", "4"]}
    with pytest.raises(InputError, match="no sentences about 'b'"):
        as_many({"a": ["1"], "b": []})


def test_long_sentences_are_cut_and_others_left_alone(tiny_clip):
    words = [f"word{i}" for i in range(60)]
    long = " ".join(words)
    texts = ["A cat.", long, "A dog with a tail.", "A cat."]
    features = sentence_features(tiny_clip, texts)
    plain = F.normalize(tiny_clip.encode_text([texts[0], texts[2]]), dim=-1)
    torch.testing.assert_close(features[[0, 2, 3]], plain[[0, 1, 0]])
    eot, ids = tiny_clip.tokenizer.eot_token_id, tiny_clip.encode(long)[:75]
    row = torch.tensor([[tiny_clip.tokenizer.sot_token_id, *ids, eot]])
    full = tiny_clip.model.encode_text(row, normalize=True)
    torch.testing.assert_close(features[1:2], full, rtol=1e-4, atol=1e-5)


def test_texts_are_read_like_a_split():
    texts = Texts(["a", "b", "c"], torch.tensor([0, 0, 1]))
    some = texts.take([2, 0])
    assert len(texts) == 3 and some.texts(torch.tensor([1, 0])) == ["a", "c"]
    assert some.labels.tolist() == [1, 0]


def test_a_fitting_file_says_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        descriptions_for(write(tmp_path, "said.json", COPROMPT), CLASSES)


def test_lists_of_official_configurations():
    """They follow the classes, new ones behind; two of one name must not differ."""
    ours = {"said": ["red", "blue"], "n": 2}
    official = {"new_classnames": ["c"], "new_said": ["green"]}
    found = by_class(ours, official, ["a", "b"], "said", "more")
    assert found == {"said": {"a": "red", "b": "blue", "c": "green"}, "n": 2}
    assert by_class({"said": ["x", "x"]}, {}, ["a", "a"], "said")["said"] == {"a": "x"}
    with pytest.raises(InputError, match="said differ for two classes .* 'a'"):
        by_class(ours, official | {"new_classnames": ["a"]}, ["a", "b"], "said")
    with pytest.raises(InputError, match="said has texts for 2 classes, and .* 3"):
        by_class(ours, official, ["a", "b", "c"], "said")
    with pytest.raises(InputError, match="new_said has texts for 1 classes"):
        by_class(ours, official | {"new_classnames": ["c", "d"]}, ["a", "b"], "said")
