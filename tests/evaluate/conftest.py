import pytest
import torch

from fastgpt import GPT, GPTConfig, Tokenizer
from fastgpt.finetune.dialogues import read_dialogues
from fastgpt.template import CHATML, encode_dialogue

ANSWERS = {"Who sees the sea?": "Ada sees the sea.", "What is hidden?": "Two hats!", "Who is it?": "Bo"}


@pytest.fixture(scope="session")
def instructions(tmp_path_factory):
    """An Alpaca file of three instructions; the model below has learnt the answers to them."""
    import json

    path = tmp_path_factory.mktemp("instructions") / "held_out.json"
    rows = [{"instruction": q, "input": "", "output": a} for q, a in ANSWERS.items()]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="session")
def taught(tokenizer_dir, instructions, tmp_path_factory):
    """A model folder, ChatML its template, that answers the instructions word for word."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("taught")
    tokenizer = Tokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = CHATML
    model = GPT(GPTConfig.preset("micro", vocab_size=tokenizer.vocab_size, n_positions=128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows = [encode_dialogue(tokenizer, dialogue) for dialogue in read_dialogues(instructions)]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    targets = torch.tensor(
        [
            [t if r else -100 for t, r in zip(ids, response, strict=True)] + [-100] * (width - len(ids))
            for ids, response in rows
        ]
    )
    for _ in range(60):
        loss = model.loss(ids[:, :-1], targets[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05
    model.save_pretrained(folder, tokenizer.eot_id)
    tokenizer.save_pretrained(folder)
    return folder
