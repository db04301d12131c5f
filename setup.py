"Builds the package from `settings.ini`, which nbdev reads too."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=['='])
parser.read(Path(__file__).with_name('settings.ini'), encoding='utf-8')
cfg = parser['DEFAULT']
README = Path(__file__).with_name('README.md')
EXTRAS = ('dpo', 'dev')


def words(key): return cfg[key].split()


setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=README.read_text(encoding='utf-8') if README.exists() else '',
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    keywords=cfg['keywords'],
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Developers', 'Programming Language :: Python :: 3',
                 *(f'Programming Language :: Python :: {version}' for version in ('3.11', '3.12', '3.13'))],
    packages=find_packages(include=['homelab_ft', 'homelab_ft.*']),
    package_data={'homelab_ft': ['assets/**/*', '**/*.yaml', '**/*.json']},
    include_package_data=False,   # what package_data says, no more
    python_requires=f">={cfg['min_python']}",
    install_requires=words('requirements'),
    extras_require={extra: words(f'{extra}_requirements') for extra in EXTRAS},
    entry_points={'console_scripts': words('console_scripts'), 'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False,
)
