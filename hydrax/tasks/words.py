"""Words for tasks in text: keys of two words, names of people, words that mean nothing."""

import numpy as np


def table(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


def compounds(first: str, second: str) -> tuple[str, ...]:
    """Every word of one text with every word of another."""
    return tuple(a + b for a in table(first) for b in table(second))


ADJECTIVES = table(
    "able amber ample azure bare bold brave brief bright brisk broad calm cheap clean clear clever cold cool crisp "
    "curly daily damp dark deep dense dim dry dull eager early easy empty even faint fair famous fancy fast fine firm "
    "flat fond fresh gentle giant glad golden grand green grey handy happy harsh heavy hollow honest humble idle jolly "
    "keen kind large late lazy lean light little lone loud lucky mild modest narrow neat noble odd old pale plain "
    "proud pure quick quiet rapid rare ready red rich rough round royal rusty sharp shiny short silent simple slow "
    "small smooth"
)
NOUNS = table(
    "acorn anchor apple arrow badge barrel basket beach bell berry bird boat book bottle branch bridge brush bucket "
    "button cabin candle canoe canyon carpet castle chair cliff cloud coat coin copper cotton cradle crane crown "
    "curtain desert diamond door dragon drum eagle engine falcon feather fence field flower forest fox garden glove "
    "guitar hammer harbor hat hill horse island jacket jewel kettle key ladder lake lamp lantern leaf lemon lion "
    "magnet maple marble meadow mirror moon mountain needle oak ocean orange otter owl paper pearl pebble pencil "
    "piano pillow planet pocket rabbit ribbon river robin rocket saddle sail shell silver"
)
FIRST_NAMES = compounds(
    "Al Bel Cor Dan El Fer Gar Hel Is Jor Kal Lor Mar Nor Ol Per Ros Sal Tor Ver", "a an ena ia in iel is o on us"
)
LAST_NAMES = compounds(
    "Ash Black Brook Clay Dale East Fair Gold Green Hart High Lang Mill North Old Red Stone Under West Wood",
    "berg field ford ham ley man son ton ward well",
)
SYLLABLES = compounds("b d f g h j k l m n p r s t v z", "a e i o u")


def keys(rng: np.random.Generator, count: int) -> list[str]:
    """Different keys, an adjective and a noun each; there are len(ADJECTIVES) · len(NOUNS) of them."""
    chosen = rng.choice(len(ADJECTIVES) * len(NOUNS), count, replace=False)
    return [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in chosen.tolist()]


def coined(rng: np.random.Generator, count: int) -> list[str]:
    """Different words of three syllables, six letters, which mean nothing; there are 512,000 of them."""
    n = len(SYLLABLES)
    chosen = rng.choice(n**3, count, replace=False).tolist()
    return [SYLLABLES[i // n**2] + SYLLABLES[i // n % n] + SYLLABLES[i % n] for i in chosen]
