#!/usr/bin/env bash
# Builds the documentation as a site into target/book/html. A warning of mdBook is an error. Links are checked by tests/docs.rs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
mdbook_version=0.5.4
PATH="$PWD/target/tools/bin:$PATH:${HOME:-/root}/.cargo/bin"

if [[ $(mdbook --version 2>/dev/null) != "mdbook v$mdbook_version" ]]; then
    echo "book: installing mdbook $mdbook_version into target/tools" >&2
    cargo install mdbook --version "$mdbook_version" --locked --no-default-features --features search --root target/tools
fi

book=target/book
rm -rf "$book"
mkdir -p "$book/src"
cp deploy/book/book.toml "$book/"
cp docs/*.md "$book/src/"
# Pages of the repository's root are pages of the book.
for page in README CHANGELOG CONTRIBUTING SECURITY; do
    sed -E 's#\]\(docs/([^)]*)\)#](\1)#g' "$page.md" >"$book/src/$page.md"
done
sed -i -E 's#\]\(\.\./(README|CHANGELOG|CONTRIBUTING|SECURITY)\.md#](\1.md#g' "$book"/src/*.md

log=$(mdbook build --dest-dir "$PWD/$book/html" "$book" 2>&1) || { echo "$log" >&2 && exit 1; }
if grep -qiE 'warn|error' <<<"$log"; then
    printf 'book: mdbook complains:\n%s\n' "$log" >&2
    exit 1
fi
echo "book: $book/html/index.html, $(find "$book/html" -name '*.html' | wc -l) pages"
