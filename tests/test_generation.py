"""All of `generate` with images, and chat sessions that keep their cache."""

import copy
import json
from contextlib import contextmanager
from threading import Thread

import pytest
import torch
from conftest import ROOT, conversation, recorded_image, refused, relative_error
from transformers import DynamicCache, GenerationConfig, TextIteratorStreamer, WatermarkingConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks import chat_session

SHORT = {"max_new_tokens": 8}
IMAGES = [recorded_image(90, 60, 0), recorded_image(200, 130, 1), recorded_image(64, 64, 2)]


@pytest.fixture
def one_image(recording) -> dict[str, torch.Tensor]:
    return recording.encode(conversation("What is it?", IMAGES[0]))


@contextmanager
def passes(model):
    """A list that gets the number of tokens of each pass of the language model."""
    lengths = []
    hook = model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    yield lengths
    hook.remove()


# -- decoding ----------------------------------------------------------------------------------------------------------
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_batch_with_different_numbers_of_images_equals_one_by_one(recording, way):
    questions = [(f"{count} pictures{' and words' * count}?", *IMAGES[:count]) for count in (2, 0, 3, 1)]
    batch = recording.encode(*(conversation(*question) for question in questions))
    assert batch["num_scales"].shape == (6,) and (batch["attention_mask"][:, 0] == 0).sum() == 3
    alone = [recording.generate(recording.encode(conversation(*question)), **way) for question in questions]
    assert torch.equal(recording.generate(batch, **way), torch.cat(alone))
    with torch.no_grad():
        logits = recording.model(**batch).logits[:, -1:]
        expected = [recording.model(**recording.encode(conversation(*one))).logits[:, -1:] for one in questions]
    assert relative_error(logits, torch.cat(expected)) < 1e-5


def test_transition_scores_are_the_log_probabilities(recording, one_image):
    output = recording.model.generate(**one_image, **SHORT, output_scores=True, return_dict_in_generate=True)
    scores = recording.model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    expected = [logits.log_softmax(-1).max() for logits in output.scores]
    assert torch.allclose(scores[0], torch.stack(expected))


def test_watermark_changes_the_tokens(recording, one_image):
    watermark = WatermarkingConfig(bias=50.0, seeding_scheme="selfhash")
    marked = recording.generate(one_image, watermarking_config=watermark)
    assert not torch.equal(marked, recording.generate(one_image))


def test_prefill_in_chunks_is_the_same_for_text_and_refused_with_images(recording, one_image):
    text = recording.encode(conversation("How many words does this question have?"))
    with torch.compiler.set_stance("force_eager"):  # transformers compiles the pass of a chunk
        try:
            assert torch.equal(recording.generate(text, prefill_chunk_size=16), recording.generate(text))
        except ValueError as error:  # transformers 5.0 refuses it for every model
            assert "without a cache" in str(error)
    for settings in ({"prefill_chunk_size": 64}, {"generation_config": GenerationConfig(prefill_chunk_size=64)}):
        with refused("prefill_chunk_size would split a prompt inside its images"):
            recording.model.generate(**one_image, **settings)


@pytest.mark.parametrize("num_old", [0, 1, 2])
def test_a_second_turn_takes_its_new_images_with_the_first_turns_cache(recording, num_old):
    """All images of the conversation are given; those in the cache are not encoded again."""
    first = conversation("What is it?", *IMAGES[:num_old])
    cache = DynamicCache()
    sequences = recording.model.generate(**recording.encode(first), max_new_tokens=3, past_key_values=cache)
    answer = {"role": "assistant", "content": "A."}
    inputs = recording.encode([*first, answer, *conversation("And this?", *IMAGES[num_old:])])
    prompt = inputs["input_ids"]
    shared = min(cache.get_seq_length(), int((sequences == prompt[:, : sequences.shape[1]]).cumprod(-1).sum()))
    if shared < cache.get_seq_length():
        cache.crop(shared - cache.get_seq_length())
    encoded = []
    hook = recording.model.vision_model.register_forward_pre_hook(lambda _, args: encoded.append(len(args[1])))
    again = recording.generate(inputs, past_key_values=cache)
    hook.remove()
    assert encoded == [sum(inputs["num_scales"].tolist()[num_old:])]
    assert torch.equal(again, recording.generate(inputs))


@pytest.mark.parametrize("name", ["max_new_token", "pixel_value", "images"])
def test_a_misspelled_keyword_is_an_error(recording, one_image, name):
    with pytest.raises((ValueError, TypeError), match=name):
        recording.generate(one_image, **{name: 4})
    for part in (recording.model, recording.model.model):
        with pytest.raises(TypeError, match=name):
            part(**one_image, **{name: 4})


def test_samples_follow_their_own_pictures(recording):
    batch = recording.encode(conversation("What is it?", *IMAGES[:1]), conversation("And these two?", *IMAGES[1:]))
    greedy = recording.generate(batch)
    certain = recording.generate(batch, do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(certain, greedy.repeat_interleave(3, dim=0))
    torch.manual_seed(1)
    sampled = recording.generate(batch, do_sample=True, num_return_sequences=3)
    assert len({tuple(row) for row in sampled.tolist()}) == 6
    torch.manual_seed(1)
    assert torch.equal(sampled, recording.generate(batch, do_sample=True, num_return_sequences=3))


def test_scores_of_beams_are_those_of_their_sequences(recording):
    inputs = recording.encode(conversation("What is it?", *IMAGES[:2]))
    settings = {"num_beams": 4, "num_return_sequences": 4, "output_scores": True, "return_dict_in_generate": True}
    slots = recording.tokenizer.convert_tokens_to_ids(["<IMG_CONTEXT>", "<img>"])  # would be taken for an image's below
    output = recording.model.generate(**inputs, **settings, **SHORT, eos_token_id=None, suppress_tokens=slots)
    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw", "num_scales")}
    assert len({tuple(row) for row in output.sequences.tolist()}) == 4
    for sequence, score in zip(output.sequences, output.sequences_scores, strict=True):
        with torch.no_grad():
            log_probs = recording.model(sequence[None], **images).logits[0, -9:-1].log_softmax(-1)
        expected = log_probs.gather(1, sequence[-8:, None]).mean()
        assert abs(expected - score) < 1e-4


def test_prompt_lookup_decodes_greedily_past_a_copied_image(recording):
    # The prompt ends as the text in front of its picture did, so that the first candidates are the picture's slots.
    inputs = recording.processor(images=IMAGES[0], text="see this\n<image> see this\n", return_tensors="pt")
    expected = recording.generate(inputs, max_new_tokens=30)
    with passes(recording.model) as lengths:
        looked_up = recording.generate(inputs, max_new_tokens=30, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up[:, :30], expected)  # transformers may add a token or two beyond max_new_tokens
    assert len(lengths) < 30 and max(lengths[1:]) == 4  # candidates were proposed and some of them accepted


def test_assisted_decoding_equals_greedy(recording):
    inputs = recording.encode(conversation("What is it?", *IMAGES[:2]))
    expected = recording.generate(inputs)
    twin = copy.deepcopy(recording.model)
    stranger = copy.deepcopy(recording.model)
    for parameter in stranger.language_model.parameters():
        parameter.data += 0.3 * parameter.std() * torch.randn_like(parameter)
    num_passes = []
    for assistant in (twin, stranger):
        assistant.generation_config.update(num_assistant_tokens=4, assistant_confidence_threshold=0.0)
        with passes(recording.model) as lengths:
            assert torch.equal(recording.generate(inputs, assistant_model=assistant), expected)
        num_passes.append(len(lengths))
    assert num_passes[0] < num_passes[1] <= 8  # a good assistant saves passes


def test_iterator_streamer_gives_the_answer_piece_by_piece(recording, one_image):
    streamer = TextIteratorStreamer(recording.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    settings = {"do_sample": True, "min_new_tokens": 60, "max_new_tokens": 60}  # long enough to have words
    torch.manual_seed(1)
    expected = recording.tokenizer.decode(recording.generate(one_image, **settings)[0], skip_special_tokens=True)
    torch.manual_seed(1)
    thread = Thread(target=recording.model.generate, kwargs={**one_image, **settings, "streamer": streamer})
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert len(pieces) > 1 and "".join(pieces) == expected


def test_stop_strings_end_every_row_where_it_says_them(recording):
    batch = recording.encode(conversation("What is it?", IMAGES[0]), conversation("Two?", *IMAGES[1:]))
    whole, decode = recording.generate(batch, max_new_tokens=20), recording.tokenizer.decode
    stops = [next(letter for letter in decode(row) if letter.isascii() and letter.isalpha()) for row in whole]
    stopped = recording.generate(batch, max_new_tokens=20, stop_strings=stops, tokenizer=recording.tokenizer)
    for row, complete in zip(stopped, whole, strict=True):
        written = row[row != recording.tokenizer.pad_token_id]
        says_it = [any(stop in decode(complete[:count]) for stop in stops) for count in range(21)]
        assert torch.equal(written, complete[: says_it.index(True)])


# -- caches ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def recorded_answer(tiny):
    """The embedded checkpoint's inputs for a recorded example, and its answer."""
    example = json.loads((ROOT / "examples" / "answers.json").read_text())[0]
    chat = conversation(example["question"], str(ROOT / example["image"]))
    inputs = tiny.processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    return inputs, example["answer"]


@pytest.mark.parametrize(
    ("package", "backend"), [("optimum.quanto", {"backend": "quanto"}), ("hqq", {"backend": "HQQ"})]
)
def test_quantized_cache_answers_the_same(tiny, recorded_answer, package, backend):
    pytest.importorskip(package)
    inputs, answer = recorded_answer
    cache = {"nbits": 4, "axis_key": 1, "axis_value": 1} if package == "hqq" else {"nbits": 4}
    settings = {**SHORT, "output_logits": True, "return_dict_in_generate": True}
    exact = tiny.model.generate(**inputs, **settings)
    quantized = {"cache_implementation": "quantized", "cache_config": {**backend, **cache}}
    output = tiny.model.generate(**inputs, **settings, **quantized)
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    assert tiny.processor.post_process_image_text_to_text(new) == [answer]
    error = relative_error(torch.cat(output.logits[1:2]), torch.cat(exact.logits[1:2]))
    assert 1e-5 < error < 0.3  # the second token is the first that reads the rounded cache


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading moves keys and values between CPU and GPU")
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_offloaded_cache_answers_the_same(tiny, recorded_answer, implementation):
    inputs, answer = recorded_answer
    model, inputs = copy.deepcopy(tiny.model).cuda(), inputs.to("cuda")
    output = model.generate(**inputs, **SHORT, cache_implementation=implementation)
    new = output[:, inputs["input_ids"].shape[1] :]
    assert tiny.processor.post_process_image_text_to_text(new) == [answer]


# -- attention weights -------------------------------------------------------------------------------------------------
def test_attention_weights_are_those_of_the_kernel(recording, monkeypatch):
    """With unit vectors as values, the kernel returns its weights."""
    inputs = recording.encode(conversation("What is it?", *IMAGES[:2]), conversation("Nothing?"))
    seen, kernel = [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module, query, key, value, mask, **options):
        unit = torch.eye(key.shape[2]).expand(*key.shape[:2], -1, -1)
        seen.append(kernel(module, query, key, unit, mask, **options)[0].transpose(1, 2))
        return kernel(module, query, key, value, mask, **options)

    with torch.no_grad():
        outputs = recording.model(**inputs, output_attentions=True)
        assert relative_error(outputs.logits, recording.model(**inputs).logits) < 1e-5
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy)
        recording.model(**inputs)
    assert len(outputs.attentions) == len(seen) == recording.model.config.text_config.num_hidden_layers
    real = inputs["attention_mask"].bool()
    for weights, expected in zip(outputs.attentions, seen, strict=True):
        weights, expected = weights.transpose(1, 2)[real], expected.transpose(1, 2)[real]
        assert torch.allclose(weights, expected, atol=1e-5)


# -- conversations that keep their cache -------------------------------------------------------------------------------
TURNS = [  # the images of a question are new ones
    ("What is it?", IMAGES[0]),
    ("And then?", None),
    ("Is <image> like <image>?", IMAGES[1:]),
    ("Why?", None),
    ("This one?", IMAGES[0]),
]


def chat_turn_by_turn(recording, session) -> tuple[list[int], list[int]]:
    """Asks a session every question, and `chat` too; each turn's tokens, and how many the cache held."""
    lengths, saved = [], []
    for question, images in TURNS:
        history = list(session.history)
        answer = session.ask(question, images)
        asked = session.history[-1][0]
        assert session.history == [*history, (asked, answer)]
        expected = recording.model.chat(recording.tokenizer, session.images, asked, SHORT, history=history)
        assert answer == expected
        grids = [session.images[name] for name in ("image_grid_thw", "num_scales") if session.images]
        plans = recording.model.image_processor.plans_of_grids(*grids) if grids else []
        prompt = recording.model.encode_chat(recording.tokenizer, [*history, (asked, None)], plans)
        lengths.append(prompt.shape[1])
        saved.append(prompt.shape[1] - session.num_prefilled)
    return lengths, saved


def test_session_answers_as_chat_does_without_prefilling_again(recording):
    lengths, saved = chat_turn_by_turn(recording, recording.model.chat_session(recording.tokenizer, SHORT))
    assert saved[0] == 0
    # A turn reuses at least the whole prompt of the turn before.
    assert all(reused >= before - 2 for reused, before in zip(saved[1:], lengths, strict=False))


def test_session_encodes_a_picture_once_and_streams(recording):
    encoded, session = [], recording.model.chat_session(recording.tokenizer, SHORT)
    hook = recording.model.vision_model.register_forward_pre_hook(lambda _, args: encoded.append(len(args[1])))
    for question, images in TURNS:
        streamer = TextIteratorStreamer(recording.tokenizer, skip_prompt=True, skip_special_tokens=True)
        answer = session.ask(question, images, streamer=streamer)
        assert "".join(streamer).strip() == answer
    hook.remove()
    first, second, third, again = session.images["num_scales"].tolist()
    assert encoded == [first, second + third, again] and second > 1
    assert session.history[-1][0] == "<image>\nThis one?"


def test_session_prefills_again_where_keys_depend_on_the_length(recording, monkeypatch):
    text = recording.model.config.text_config
    monkeypatch.setattr(text, "rope_scaling", {"rope_type": "dynamic", "factor": 2.0})
    monkeypatch.setattr(text, "max_position_embeddings", 300)
    lengths, saved = chat_turn_by_turn(recording, recording.model.chat_session(recording.tokenizer, SHORT))
    assert saved[1] > 0 and lengths[-1] > 300
    assert all((reused == 0) == (length > 300) for reused, length in zip(saved[1:], lengths[1:], strict=True))


def test_failed_turn_leaves_the_session_as_it_was(recording):
    class Broken(TextIteratorStreamer):
        def end(self):
            raise RuntimeError("the listener is gone")

    session = recording.model.chat_session(recording.tokenizer, SHORT)
    session.ask("What is it?", IMAGES[0])
    history, images = list(session.history), dict(session.images)
    with pytest.raises(RuntimeError, match="the listener is gone"):
        session.ask("And this?", IMAGES[1], streamer=Broken(recording.tokenizer))
    for message, arguments in [
        ("must be a text that is not empty", ("",)),
        ("3 <image> placeholders but 2 images", ("<image> <image>", IMAGES[1])),
        ("contains <|im_end|>", ("a<|im_end|>",)),
    ]:
        with refused(message):
            session.ask(*arguments)
    assert session.history == history and session.images.keys() == images.keys()
    expected = recording.model.chat(recording.tokenizer, IMAGES[0], "And now?", SHORT, history=history)
    assert session.ask("And now?") == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "num_beams must be 1, got 2"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences must be 1, got 2"),
        ({"use_cache": False}, "use_cache must be True, got False"),
        ({"cache_implementation": "static"}, "cache_implementation must be None, got 'static'"),
    ],
)
def test_sessions_refuse_what_has_no_cache_of_one_sequence(recording, settings, message):
    with pytest.raises(ValueError, match=message):
        recording.model.chat_session(recording.tokenizer, settings)


def test_benchmark_of_sessions_counts_the_tokens_saved(recording, capsys):
    options = ["--model", str(recording.folder), "--turns", "2", "--repeats", "1", "--max-new-tokens", "3"]
    assert chat_session.main(options) == 0
    first, second, total = (row.split() for row in capsys.readouterr().out.splitlines()[-3:])
    assert first[1] == first[2] and first[-1] == second[-1] == "True"
    assert int(second[2]) < int(second[1]) and int(total[2]) == int(first[2]) + int(second[2])
