//! A Rust file as words and signs, without comments, literals and lifetimes. Start with `tokens`.

#[derive(Debug, Clone)]
pub(crate) struct Token {
    pub(crate) line: usize,
    pub(crate) text: String,
}

impl Token {
    pub(crate) fn is_word(&self) -> bool {
        self.text.starts_with(|c: char| c.is_alphabetic() || c == '_')
    }
}

/// Words, `::` and single signs; comments, literals and lifetimes are left out.
pub(crate) fn tokens(text: &str) -> Vec<Token> {
    let chars: Vec<char> = text.chars().collect();
    let at = |index: usize| chars.get(index).copied().unwrap_or('\0');
    let mut tokens = Vec::new();
    let mut line = 1;
    let mut here = 0;
    while here < chars.len() {
        let start = here;
        match at(here) {
            '/' if at(here + 1) == '/' => {
                while here < chars.len() && at(here) != '\n' {
                    here += 1;
                }
            }
            '/' if at(here + 1) == '*' => here = after_block_comment(&chars, here),
            '"' => here = after_string(&chars, here),
            '\'' if at(here + 1) == '\\' || at(here + 2) == '\'' => here = after_char(&chars, here),
            // A lifetime: the word that follows names no path.
            '\'' => here = after_word(&chars, here + 1),
            ':' if at(here + 1) == ':' => {
                tokens.push(Token { line, text: "::".to_owned() });
                here += 2;
            }
            c if c.is_alphanumeric() || c == '_' => {
                here = after_word(&chars, here);
                let word: String = chars[start..here].iter().collect();
                let raw = matches!(word.as_str(), "r" | "br" | "cr");
                if raw && (at(here) == '"' || (at(here) == '#' && matches!(at(here + 1), '"' | '#'))) {
                    here = after_raw_string(&chars, here);
                } else if raw && at(here) == '#' {
                    let end = after_word(&chars, here + 1);
                    tokens.push(Token {
                        line,
                        text: format!("r#{}", chars[here + 1..end].iter().collect::<String>()),
                    });
                    here = end;
                } else {
                    tokens.push(Token { line, text: word });
                }
            }
            c => {
                if !c.is_whitespace() {
                    tokens.push(Token { line, text: c.to_string() });
                }
                here += 1;
            }
        }
        line += chars[start..here.min(chars.len())].iter().filter(|&&c| c == '\n').count();
    }
    tokens
}

fn after_word(chars: &[char], start: usize) -> usize {
    let length =
        chars[start.min(chars.len())..].iter().take_while(|c| c.is_alphanumeric() || **c == '_').count();
    start + length
}

fn after_block_comment(chars: &[char], start: usize) -> usize {
    let mut depth = 0_usize;
    let mut here = start;
    while here < chars.len() {
        let pair = (chars[here], chars.get(here + 1));
        if pair == ('/', Some(&'*')) {
            depth += 1;
            here += 2;
        } else if pair == ('*', Some(&'/')) {
            depth -= 1;
            here += 2;
            if depth == 0 {
                break;
            }
        } else {
            here += 1;
        }
    }
    here
}

fn after_string(chars: &[char], start: usize) -> usize {
    let mut here = start + 1;
    while here < chars.len() && chars[here] != '"' {
        here += if chars[here] == '\\' { 2 } else { 1 };
    }
    here + 1
}

fn after_char(chars: &[char], start: usize) -> usize {
    let mut here = start + 1;
    while here < chars.len() && chars[here] != '\'' {
        here += if chars[here] == '\\' { 2 } else { 1 };
    }
    here + 1
}

/// `start` is at the first `#` or `"` behind the `r`.
fn after_raw_string(chars: &[char], start: usize) -> usize {
    let hashes = chars[start..].iter().take_while(|c| **c == '#').count();
    let mut here = start + hashes + 1;
    while here < chars.len() {
        let closes = chars[here] == '"'
            && chars[here + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes;
        here += 1;
        if closes {
            return here + hashes;
        }
    }
    here
}
