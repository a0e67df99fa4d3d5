"""Merging text encoders of transformers, each with a classification head for its task.

Three experts, fine-tuned from one small BERT, are merged by coefficients learned on unlabeled
sentences, taught by the experts' own predictions; the merge is put back into an ordinary BERT.
"""

import random
from copy import deepcopy
from functools import partial

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import adamerge

WORDS = {  # the words that tell a class, by task
    "mood": ["glad merry sunny", "sad gloomy sour", "angry cross wild"],
    "topic": ["boat harbour wave", "tree meadow moss", "street tower tram"],
    "time": ["yesterday ago once", "now today already", "tomorrow soon later"],
}
FILLERS = "the a it we they see saw will of and in by with old new two some very"
known = f"[PAD] {FILLERS} {' '.join(' '.join(classes) for classes in WORDS.values())}".split()
by_word = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, "[PAD]"))
by_word.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=by_word, pad_token="[PAD]")
tokens = partial(tokenizer, padding="max_length", max_length=12, return_tensors="pt")


def texts(task: str, count: int, seed: int) -> tuple[list[str], Tensor]:
    """Sentences with two words of a class of the task and one of another task; these classes."""
    draw, sentences, classes = random.Random(seed), [], []
    for _ in range(count):
        classes += [draw.randrange(3)]
        other = WORDS[draw.choice([name for name in WORDS if name != task])][draw.randrange(3)]
        telling = [*draw.sample(WORDS[task][classes[-1]].split(), 2), draw.choice(other.split())]
        sentence = telling + draw.choices(FILLERS.split(), k=draw.randint(2, 8))
        sentences += [" ".join(draw.sample(sentence, len(sentence)))]
    return sentences, torch.tensor(classes)


def predicted(network: nn.Module, task: str, sentences: list[str]) -> Tensor:
    return heads[task](network(**tokens(sentences)).pooler_output)


def train(network: nn.Module, tasks: list[str], steps: int) -> nn.Module:  # with labels
    optimizer = torch.optim.Adam([*network.parameters(), *heads.parameters()], lr=2e-3)
    for step in range(steps):
        x, y = texts(task := tasks[step % len(tasks)], 64, seed=1000 + step)
        optimizer.zero_grad()
        cross_entropy(predicted(network, task, x), y).backward()
        optimizer.step()
    return network


@torch.no_grad()
def accuracy(network: nn.Module) -> float:  # in %, the mean over the tasks, of new sentences
    tests = {task: texts(task, 300, seed=1) for task in WORDS}
    right = [predicted(network, task, x).argmax(1).eq(y) for task, (x, y) in tests.items()]
    return 100 * torch.cat(right).float().mean().item()


torch.manual_seed(2)
sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
bert = BertModel(BertConfig(intermediate_size=96, **sizes)).eval()
heads = nn.ModuleDict({task: nn.Linear(48, 3) for task in WORDS})
train(bert, list(WORDS), steps=30)
experts = {task: train(deepcopy(bert), [task], steps=40) for task in WORDS}
vectors = adamerge.TaskVectors(bert, experts)
taught = adamerge.objectives.ExpertKL(heads, adamerge.encoders.Experts(bert, vectors))
loaders = {t: DataLoader(texts(t, 256, 2)[0], 32, shuffle=True, collate_fn=tokens) for t in WORDS}
for granularity in ("task", "layer"):
    method = adamerge.methods.AdaMerging(bert, vectors, granularity=granularity)
    before = accuracy(method.fold().backbone)  # task arithmetic
    adamerge.adapt(method, loaders, taught, steps=30, lr=1e-2)
    bert.load_state_dict(method.merged_state_dict())  # and bert.save_pretrained("folder")
    print(f"{granularity}-wise: {before:.1f} % before, {accuracy(bert):.1f} % after")
