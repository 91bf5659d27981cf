"""An encoder RNN reads an English word, a decoder RNN spells the Spanish one.

The encoder's last state is all that the decoder knows of the word. While training, the decoder is given the right previous
character (teacher forcing); afterwards it is given its own.
"""

import torch

import fused_rnn

PAIRS = [("hello", "hola"), ("cat", "gato"), ("good", "bueno")]
START, END = "<", ">"
CHARACTERS = START + END + "abcdefghijklmnopqrstuvwxyz"


def indices(word):
    return torch.tensor([CHARACTERS.index(character) for character in word])


def one_hot(word):
    return torch.nn.functional.one_hot(indices(word), len(CHARACTERS)).float()  # [len(word), characters]


class Translator(torch.nn.Module):
    def __init__(self, hidden_size=128):
        super().__init__()
        self.encoder = fused_rnn.RNN(len(CHARACTERS), hidden_size)
        self.decoder = fused_rnn.RNN(len(CHARACTERS), hidden_size)
        self.read_out = torch.nn.Linear(hidden_size, len(CHARACTERS))

    def forward(self, word, previous):
        """Scores of every character of the translation, given the ones before it."""
        _, state = self.encoder(one_hot(word))
        hidden, _ = self.decoder(one_hot(previous), state)
        return self.read_out(hidden)

    @torch.no_grad()
    def translate(self, word, longest=10):
        _, state = self.encoder(one_hot(word))
        spelled = START
        while len(spelled) <= longest and spelled[-1] != END:
            hidden, state = self.decoder(one_hot(spelled[-1]), state)
            spelled += CHARACTERS[self.read_out(hidden[-1]).argmax()]
        return spelled.strip(START + END)


def main(epochs=1000, seed=0):
    torch.manual_seed(seed)
    model = Translator()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    loss = torch.zeros(())
    for epoch in range(epochs):
        loss = torch.zeros(())
        for english, spanish in PAIRS:
            scores = model(english, START + spanish)
            loss = loss + torch.nn.functional.cross_entropy(scores, indices(spanish + END))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (epoch + 1) % 100 == 0:
            print(f"epoch {epoch + 1:4}: summed loss {loss.item():.5f}")
    translations = {english: model.translate(english) for english, _ in PAIRS}
    for english, spanish in translations.items():
        print(f"{english} -> {spanish}")
    return loss.item(), translations


if __name__ == "__main__":
    main()
