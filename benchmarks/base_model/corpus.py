"""The public-domain corpus as clean text: which books train the base model, and which are held out."""
import hashlib, re, tarfile
from pathlib import PurePosixPath

HELD_OUT_SHARE = 0.05   # of the books, chosen by the hash of their name


def books(archive):
    "Yield `(author, title, text)` of every Markdown book in the tar `archive`, sorted by name."
    with tarfile.open(archive) as tar:
        members = sorted((m for m in tar.getmembers() if m.isfile() and m.name.endswith('.md')), key=lambda m: m.name)
        for m in members:
            path = PurePosixPath(m.name)
            yield path.parent.name, path.stem, plain(tar.extractfile(m).read().decode('utf-8', errors='replace'))


def plain(markdown):
    "Markdown as running text: no emphasis marks, no heading marks, lines of one paragraph joined."
    text = re.sub(r'[*_`]{1,3}', '', markdown.replace('\r\n', '\n'))
    text = re.sub(r'^#+ *', '', text, flags=re.M)
    paragraphs = (re.sub(r'\s+', ' ', p).strip() for p in re.split(r'\n\s*\n', text))
    return '\n\n'.join(p for p in paragraphs if p)


def is_held_out(author, title):
    "True for the books that training never sees; depends on the name alone."
    digest = hashlib.sha256(f'{author}/{title}'.encode()).digest()
    return int.from_bytes(digest[:4], 'big') / 2**32 < HELD_OUT_SHARE


def split_books(archive):
    "All books as `(train, held_out)`, each a list of `(author, title, text)`."
    train, held_out = [], []
    for author, title, text in books(archive):
        (held_out if is_held_out(author, title) else train).append((author, title, text))
    return train, held_out
