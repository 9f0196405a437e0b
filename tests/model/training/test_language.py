"""Tokenizer and training pass: spelling, templates, and the same numbers as transformers."""

import json

import numpy as np
import pytest
import torch

from model.loading import load
from model.training import dataset, scenes, tower, train, twins
from model.training.muon import Muon, orthogonal
from model.training.tokenizer import make_tokenizer
from tests.model.training.half import same_way


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize("text", ["R3KN", "4.50", "there is none", "what does the red sign say?", "Foo Bar", "zzgh?"])
def test_text_comes_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


def test_answers_are_spelled_and_questions_are_words(tokenizer):
    assert len(tokenizer("K7PX2", add_special_tokens=False).input_ids) == 5
    assert len(tokenizer("what does the red sign say?", add_special_tokens=False).input_ids) == 7


def test_every_wording_is_made_of_whole_words(tokenizer):
    unknown = tokenizer.convert_tokens_to_ids("<unk>")
    for seed in range(40):
        for question in scenes.make_scene(np.random.default_rng(seed)).questions:
            ids = tokenizer(question.question, add_special_tokens=False).input_ids
            assert unknown not in ids
            spelled = [
                t for t in tokenizer.convert_ids_to_tokens(ids) if len(t.strip("▁")) == 1 and t.strip("▁").isalpha()
            ]
            assert spelled in ([], ["a"], ["▁a"], ["a", "▁a"]), question.question


def test_the_template_lowers_questions_and_keeps_answers(tokenizer):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "READ the sign "}]},
        {"role": "assistant", "content": [{"type": "text", "text": "K7P"}]},
        {"role": "user", "content": "And NOW?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s><user><image>read the sign<answer>K7P</s><user>and now?<answer>"


@pytest.fixture(scope="module")
def small():
    """Six scenes, an untrained tower and its features."""
    torch.manual_seed(0)
    batch = dataset.render(6, 3)
    reader = tower.Reader(tower.config(64, 2)).eval().requires_grad_(False)
    return batch, reader, twins.encode(reader, batch)


@pytest.mark.parametrize("merge", ["stack", "none", "concat"])
def test_packed_pass_equals_transformers(small, tokenizer, merge):
    """Every question's logits are those of transformers' Llama on that question alone, stacks added by hooks."""
    batch, reader, features = small
    twin = twins.Twin(merge, reader.tower.config, len(tokenizer), features).eval()
    rows = twins.Questions(tokenizer).rows(batch.items, np.random.default_rng(0), per_scene=3)
    llama = twin.model.model.language_model
    with torch.no_grad():
        logits, result = twin(features.float(), rows)
        base, stacks = twin.inject(features.float())
        place = 0
        for i in range(len(rows.ids)):
            scene, length = i // 3, int(rows.length[i])
            lead, asked = llama.embed_tokens(torch.tensor([2, 5])), llama.embed_tokens(rows.ids[i, :length])
            hidden = torch.cat([lead, base[scene], asked])[None]

            def add(module, arguments, keywords, rows_of):
                states = arguments[0].clone()
                states[:, 2 : 2 + rows_of.shape[0]] += rows_of
                return (states, *arguments[1:]), keywords

            handles = [
                llama.layers[m].register_forward_pre_hook(
                    lambda mod, a, k, r=s[scene]: add(mod, a, k, r), with_kwargs=True
                )
                for m, s in stacks.items()
            ]
            expected = twin.model.lm_head(llama(inputs_embeds=hidden).last_hidden_state[0])[2 + base.shape[1] :]
            for handle in handles:
                handle.remove()
            scored = rows.targets[i, :length] != -100
            count = int(scored.sum())
            torch.testing.assert_close(logits[place : place + count], expected[scored], atol=5e-6, rtol=0)
            assert torch.equal(result.targets[place : place + count], rows.targets[i, :length][scored])
            place += count
        assert place == len(logits)


@pytest.mark.parametrize("merge", ["stack", "none", "concat"])
def test_folding_the_whitening_changes_nothing_but_what_enters(small, tokenizer, merge):
    """The twin trains on whitened features, each direction of about unit size; folded, on the tower's own."""
    _, reader, features = small
    features = features.double()
    twin = twins.Twin(merge, reader.tower.config, len(tokenizer), features).double()
    white = ((features - twin.centre) @ twin.whiten).flatten(0, 2)
    variances = torch.linalg.eigvalsh(torch.cov(white.T))
    assert 0.5 < variances[-1] <= 1
    before, stacks = twin.inject(features)
    twin.fold()
    after, folded = twin.inject(features)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    assert all(torch.allclose(folded[m], stacks[m], atol=1e-5) for m in stacks)
    assert torch.equal(twin.centre, torch.zeros(64).double())


def test_a_look_is_the_image_part_of_a_pass_with_questions(small, tokenizer):
    """Without questions the image rows hold what they hold beside questions: questions do not change them."""
    batch, reader, features = small
    twin = twins.Twin("stack", reader.tower.config, len(tokenizer), features).eval()
    rows = twins.Questions(tokenizer).rows(batch.items, np.random.default_rng(0), per_scene=2)
    with torch.no_grad():
        _, asked = twin(features.float(), rows)
        logits, look = twin(features.float(), None)
    assert logits is None and look.hidden is None
    torch.testing.assert_close(look.seen, asked.seen, atol=1e-5, rtol=0)


def test_muon_takes_matrices_of_one_shape_together_and_changes_each_as_alone():
    torch.manual_seed(0)
    start, grads = torch.randn(3, 6, 4), torch.randn(2, 3, 6, 4)
    together = [torch.nn.Parameter(start[i].clone()) for i in range(3)]
    alone = [torch.nn.Parameter(start[i].clone()) for i in range(3)]
    optimizers = [Muon(together, lr=0.1), *(Muon([p], lr=0.1) for p in alone)]
    for step in range(2):
        for i in range(3):
            together[i].grad, alone[i].grad = grads[step, i].clone(), grads[step, i].clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)
    update = orthogonal(grads[0, 0])  # singular values of about one: the quintic leaves them within 0.7 to 1.2
    assert 0.6 < torch.linalg.svdvals(update).min() and torch.linalg.svdvals(update).max() < 1.3


def test_features_are_the_dilated_mosaic(small):
    """Stack 3i + j holds token (3y + i, 3x + j) of the high-resolution grid, computed here tile by tile."""
    batch, reader, features = small
    high = batch.high[0]
    grid = np.zeros((24, 24), dtype=object)
    for top in range(3):
        for left in range(3):
            tile = high[top * 64 : top * 64 + 64, left * 64 : left * 64 + 64]
            rows = reader.features(tower.to_pixels(tile[None]))[0].view(8, 8, -1)
            for y in range(8):
                for x in range(8):
                    grid[top * 8 + y, left * 8 + x] = rows[y, x]
    for i in range(3):
        for j in range(3):
            for y, x in ((0, 0), (3, 5), (7, 7)):
                stored = features[0, 1 + 3 * i + j, y * 8 + x].float()
                torch.testing.assert_close(stored, grid[3 * y + i, 3 * x + j], atol=2e-3, rtol=2e-3)


def test_grounded_words_are_single_tokens(tokenizer):
    maker = twins.Questions(tokenizer)
    assert [tokenizer.decode([token]).strip() for token in maker.words] == list(twins.WORDS)


def test_the_words_of_a_question_stand_at_its_answer(small, tokenizer):
    batch, _, _ = small
    truth = twins.Questions(tokenizer).grounding(batch.items)
    assert truth.shape == (6, 64, len(twins.WORDS))
    for b, items in enumerate(batch.items):
        expected = {
            (cell, twins.WORDS.index(word))
            for item in items
            for cell in item.cells
            for word in " ".join(str(v) for _, v in item.question.words).split()
            if cell >= 0 and word in twins.WORDS
        }
        found = {tuple(place) for place in truth[b].nonzero().tolist()}
        answers = {
            (c, twins.WORDS.index(i.question.answer)) for i in items for c in i.cells if i.question.thing is not None
        }
        assert found == expected | answers


def test_variants_train_on_the_same_questions(small, tokenizer):
    """The questions of a step depend on seed and step alone."""
    batch, _, _ = small
    maker = twins.Questions(tokenizer)
    one, two = (maker.rows(batch.items, np.random.default_rng([0, 7])) for _ in range(2))
    assert torch.equal(one.ids, two.ids) and torch.equal(one.targets, two.targets)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """One work folder: as in real runs, the first variant makes scenes and tower, the others use them again."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("name", ["hires", "hires-single", "hires-concat"])
def test_two_steps_to_a_folder_that_loads_and_answers_alike(name, workdir, tmp_path, tokenizer):
    """From nothing to a checkpoint: it loads by the ordinary way, and the engine's numbers are the training pass's."""
    options = {"workdir": workdir, "steps": 2, "tower_steps": 2, "shards": 1, "per_shard": 12}
    out = train.train(name, out=tmp_path / name, device="cpu", **options)
    engine = load(str(out))
    batch = dataset.load(workdir / "data" / "validation.pkl")
    assert engine.layout.stack_names == (tuple("012345678") if name == "hires" else ())

    reader = tower.load_reader(workdir / "tower")
    twin = twins.Twin(twins.MERGE[name], reader.tower.config, len(tokenizer), twins.encode(reader, batch))
    twin.load_state_dict(torch.load(workdir / name / "last.pt", weights_only=True)["twin"])
    scene = scenes.make_scene(np.random.default_rng([train.VALIDATION_SEED, 0]))
    features = twins.encode(reader, batch)[:1].float()
    item = batch.items[0][0]
    questions = twins.Questions(tokenizer)
    rows = questions.pad([questions.turn(item.question.question, item.question.answer, item.cells)])
    with torch.no_grad():
        logits, result = twin(features, rows)
    expected = logits.log_softmax(-1).gather(1, result.targets[:, None])[:-1, 0]
    content = [{"type": "image", "image": scene.image}, {"type": "text", "text": item.question.question.upper()}]
    scored = engine.score(
        engine.prompt([{"role": "user", "content": content}]), engine.layout.default, item.question.answer
    )
    torch.testing.assert_close(
        torch.tensor([t.logprob for t in scored]), expected, atol=2e-2, rtol=0
    )  # float16 weights
    if name == "hires-single":  # what its view can tell, from a tower trained on that alone
        legible = json.loads((out / "legibility.json").read_text())
        for view in ("global view, tower trained on it alone", "high-resolution view, shared tower"):
            assert sum(height["n"] for height in legible[view].values()) > 5
    with pytest.raises(train.UserError, match="--resume"):
        train.train(name, out=tmp_path / name, device="cpu", **options)


def test_what_a_run_has_shown_is_counted():
    """200 steps in two cycles of 100: 16 with 32 scenes and no question, 184 with 8 scenes of 12 questions each."""
    shown = twins.shown((100, 200))
    assert shown == {
        "steps": 200,
        "cycles_end_at": [100, 200],
        "steps_without_questions": 16,
        "scenes_seen": 16 * 32 + 184 * 8,
        "questions_seen": 184 * 8 * 12,
    }


def test_the_rate_rises_and_falls_once_per_cycle():
    """Of 1,000 steps: 100 to rise, held up to step 470, then down to a fiftieth; the second cycle starts lower."""
    two, one = (1000, 2000), (2000,)
    for step, ends, factor in (
        (0, two, 0.01), (99, two, 1.0), (469, two, 1.0), (735, two, 0.5), (999, two, 0.02),
        (1000, two, 0.007), (1500, two, 0.35), (1999, two, 0.02), (1470, one, 0.5),
    ):  # fmt: skip
        assert twins.rate_factor(step, ends) == pytest.approx(factor), (step, ends)
    assert twins.cycle_ends(9200) == (5200, 9200)


@pytest.mark.parametrize("merge", ["stack", "none", "concat"])
def test_layers_in_bfloat16_learn_the_same(small, tokenizer, merge):
    batch, reader, features = small
    torch.manual_seed(2)
    twin = twins.Twin(merge, reader.tower.config, len(tokenizer), features)
    rows = twins.Questions(tokenizer).rows(batch.items, np.random.default_rng(0), per_scene=3)
    same_way(twin, features.float(), rows)
