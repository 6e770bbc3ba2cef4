//! One file as the list of paths its code names.
//!
//! A path is what `::` joins, in a `use` as well as in code; groups are spread out, `self` and `super` resolved
//! against the module, and names that a `use` of the file brought in are put back to where they come from. What
//! macros produce is not seen. Start with `Source::parse`.

use std::collections::BTreeMap;

use crate::tokens::{Token, tokens};

/// A path in the code, complete from the crate's root or from an external crate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Import {
    pub(crate) line: usize,
    pub(crate) target: Target,
    /// Within an item under `#[cfg(test)]`.
    pub(crate) test: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// Of this crate, from its root; a last segment `*` is a glob.
    Internal(Vec<String>),
    /// Of another crate; the first segment is its name.
    External(Vec<String>),
}

#[derive(Debug)]
pub(crate) struct Source {
    /// From the root of the crate; `main` and `bin` stand for the roots of the binaries.
    pub(crate) module: Vec<String>,
    pub(crate) imports: Vec<Import>,
    /// Modules in files of their own that are declared here under `#[cfg(test)]`.
    pub(crate) test_modules: Vec<Vec<String>>,
    tokens: Vec<Token>,
}

/// The module a file holds, by its name: `src/pve/wire.rs` is `pve::wire`.
pub(crate) fn module_of(file: &str) -> Vec<String> {
    let mut segments: Vec<String> =
        file.trim_start_matches("src/").trim_end_matches(".rs").split('/').map(str::to_owned).collect();
    if matches!(segments.last().map(String::as_str), Some("mod")) || segments == ["lib"] {
        segments.pop();
    }
    segments
}

impl Source {
    pub(crate) fn parse(module: Vec<String>, text: &str) -> Self {
        let tokens = tokens(text);
        let walk = Walk::over(&tokens, &module);
        let imports = walk.resolved();
        Self { test_modules: walk.test_modules, module, imports, tokens }
    }

    /// Calls of macros among `names`, with their lines.
    pub(crate) fn macro_calls(&self, names: &[&str]) -> Vec<(usize, String)> {
        let calls = self.tokens.windows(2).filter(|pair| pair[1].text == "!");
        calls
            .filter(|pair| names.contains(&pair[0].text.as_str()))
            .map(|pair| (pair[0].line, pair[0].text.clone()))
            .collect()
    }
}

/// Words that can stand before a path and are no part of one.
const KEYWORDS: &[&str] = &[
    "as", "await", "break", "const", "dyn", "else", "fn", "for", "if", "impl", "in", "let", "loop", "match",
    "move", "mut", "pub", "ref", "return", "static", "type", "unsafe", "where", "while",
];

/// A path as it is written, and where.
struct Written {
    line: usize,
    /// Begins with `::`.
    absolute: bool,
    segments: Vec<String>,
    module: Vec<String>,
    test: bool,
}

/// One pass over the tokens of a file.
struct Walk<'a> {
    tokens: &'a [Token],
    here: usize,
    /// Inline modules that are open, each with the depth of braces it closes at.
    modules: Vec<(String, usize)>,
    file_module: &'a [String],
    depth: usize,
    written: Vec<Written>,
    /// Names that a `use` brings in; scopes are not told apart.
    aliases: BTreeMap<String, (bool, Vec<String>, Vec<String>)>,
    /// Tokens before this one belong to an item under `#[cfg(test)]`.
    test_until: usize,
    test_modules: Vec<Vec<String>>,
}

impl<'a> Walk<'a> {
    fn over(tokens: &'a [Token], file_module: &'a [String]) -> Self {
        let mut walk = Self {
            tokens,
            here: 0,
            modules: Vec::new(),
            file_module,
            depth: 0,
            written: Vec::new(),
            aliases: BTreeMap::new(),
            test_until: 0,
            test_modules: Vec::new(),
        };
        while walk.here < tokens.len() {
            walk.step();
        }
        walk
    }

    fn text(&self, index: usize) -> &'a str {
        self.tokens.get(index).map_or("", |token| token.text.as_str())
    }

    fn module(&self) -> Vec<String> {
        self.file_module.iter().cloned().chain(self.modules.iter().map(|(name, _)| name.clone())).collect()
    }

    fn step(&mut self) {
        match self.text(self.here) {
            "{" => {
                self.depth += 1;
                self.here += 1;
            }
            "}" => {
                self.depth = self.depth.saturating_sub(1);
                if self.modules.last().is_some_and(|(_, depth)| *depth == self.depth) {
                    self.modules.pop();
                }
                self.here += 1;
            }
            "#" if self.is_cfg_test() => {
                let end = self.end_of_item(self.here);
                self.test_until = self.test_until.max(end);
                self.here = self.end_of_attribute(self.here);
            }
            "mod" if self.text(self.here + 2) == "{" => {
                self.modules.push((self.text(self.here + 1).to_owned(), self.depth));
                self.here += 2;
            }
            "mod" if self.text(self.here + 2) == ";" => {
                if self.here < self.test_until {
                    let mut module = self.module();
                    module.push(self.text(self.here + 1).to_owned());
                    self.test_modules.push(module);
                }
                self.here += 3;
            }
            "use" if !self.is_precise_capture() => {
                self.here += 1;
                self.use_tree(false, &[]);
            }
            "extern" if self.text(self.here + 1) == "crate" => {
                let name = self.text(self.here + 2).to_owned();
                self.write(self.tokens[self.here].line, true, vec![name]);
                self.here += 3;
            }
            _ => self.path_in_code(),
        }
    }

    /// `impl Trait + use<'a, T>` is no import.
    fn is_precise_capture(&self) -> bool {
        self.text(self.here + 1) == "<"
    }

    /// At `::`: it goes on from a type, as in `Vec::<T>`, `<T as Trait>::name` or `$x::name`.
    fn goes_on(&self) -> bool {
        let before = |back: usize| self.here.checked_sub(back).map_or("", |index| self.text(index));
        let word = self.here > 0 && self.tokens[self.here - 1].is_word() && !KEYWORDS.contains(&before(1));
        // The sign of `->` and of `=>` closes nothing.
        word || (before(1) == ">" && !matches!(before(2), "-" | "="))
    }

    fn path_in_code(&mut self) {
        let line = self.tokens[self.here].line;
        let absolute = self.text(self.here) == "::";
        if KEYWORDS.contains(&self.text(self.here)) {
            self.here += 1;
            return;
        }
        if absolute && self.goes_on() {
            self.here += 1;
            while self.tokens.get(self.here).is_some_and(Token::is_word) {
                self.here += if self.text(self.here + 1) == "::" { 2 } else { 1 };
                if self.text(self.here - 1) != "::" {
                    break;
                }
            }
            return;
        }
        if absolute {
            self.here += 1;
        }
        let mut segments = Vec::new();
        while self.tokens.get(self.here).is_some_and(Token::is_word) {
            segments.push(self.text(self.here).to_owned());
            self.here += 1;
            let joined =
                self.text(self.here) == "::" && self.tokens.get(self.here + 1).is_some_and(Token::is_word);
            if !joined {
                break;
            }
            self.here += 1;
        }
        if segments.len() > 1 || (absolute && !segments.is_empty()) {
            self.write(line, absolute, segments);
        } else if segments.is_empty() && !absolute {
            self.here += 1;
        }
    }

    /// From behind `use`, or from a member of a group, to its end.
    fn use_tree(&mut self, absolute: bool, prefix: &[String]) {
        let mut segments = prefix.to_vec();
        let mut absolute = absolute;
        if self.text(self.here) == "::" {
            absolute |= segments.is_empty();
            self.here += 1;
        }
        let line = self.tokens.get(self.here).map_or(0, |token| token.line);
        loop {
            match self.text(self.here) {
                "{" => {
                    self.here += 1;
                    while !matches!(self.text(self.here), "}" | "") {
                        self.use_tree(absolute, &segments);
                        if self.text(self.here) == "," {
                            self.here += 1;
                        }
                    }
                    self.here += 1;
                    return;
                }
                "*" => {
                    segments.push("*".to_owned());
                    self.here += 1;
                    self.write(line, absolute, segments);
                    return;
                }
                word => {
                    // `{self}` names the module before the group.
                    if word != "self" || segments.is_empty() {
                        segments.push(word.to_owned());
                    }
                    self.here += 1;
                }
            }
            if self.text(self.here) != "::" {
                break;
            }
            self.here += 1;
        }
        let mut name = segments.last().cloned().unwrap_or_default();
        if self.text(self.here) == "as" {
            self.text(self.here + 1).clone_into(&mut name);
            self.here += 2;
        }
        self.aliases.insert(name, (absolute, segments.clone(), self.module()));
        self.write(line, absolute, segments);
    }

    fn write(&mut self, line: usize, absolute: bool, segments: Vec<String>) {
        let test = self.here < self.test_until;
        self.written.push(Written { line, absolute, segments, module: self.module(), test });
    }

    /// At `#`: `#[cfg(test)]`, also within `all` and `any`, but not behind `not`.
    fn is_cfg_test(&self) -> bool {
        let end = self.end_of_attribute(self.here);
        let words: Vec<&str> = (self.here..end).map(|index| self.text(index)).collect();
        words.starts_with(&["#", "[", "cfg", "("]) && words.contains(&"test") && !words.contains(&"not")
    }

    /// Behind the `]` of the attribute that begins at `start`.
    fn end_of_attribute(&self, start: usize) -> usize {
        let mut depth = 0_usize;
        for index in start..self.tokens.len() {
            match self.text(index) {
                "[" => depth += 1,
                "]" if depth == 1 => return index + 1,
                "]" => depth = depth.saturating_sub(1),
                _ => {}
            }
        }
        self.tokens.len()
    }

    /// Behind the item that the attribute at `start` stands on.
    fn end_of_item(&self, start: usize) -> usize {
        let mut index = start;
        while self.text(index) == "#" {
            index = self.end_of_attribute(index);
        }
        let mut head =
            (index..self.tokens.len()).map(|at| self.text(at)).take_while(|word| !matches!(*word, "{" | ";"));
        let is_use = head.any(|word| word == "use");
        let mut depth = 0_usize;
        while index < self.tokens.len() {
            match self.text(index) {
                "{" => depth += 1,
                "}" if depth == 0 => return index,
                "}" => {
                    depth -= 1;
                    if depth == 0 && !is_use {
                        return index + 1;
                    }
                }
                ";" if depth == 0 => return index + 1,
                _ => {}
            }
            index += 1;
        }
        index
    }

    fn resolved(&self) -> Vec<Import> {
        let mut imports = Vec::new();
        for written in &self.written {
            let target = self.resolve(written.absolute, &written.segments, &written.module, &mut Vec::new());
            let import = target.map(|target| Import { line: written.line, target, test: written.test });
            imports.extend(import.filter(|import| !imports.contains(import)));
        }
        imports
    }

    /// `None` for names of the module itself and for `Self::x`. `seen` are the aliases already followed.
    fn resolve(
        &self,
        absolute: bool,
        segments: &[String],
        module: &[String],
        seen: &mut Vec<String>,
    ) -> Option<Target> {
        let (first, rest) = segments.split_first()?;
        if absolute {
            return Some(Target::External(segments.to_vec()));
        }
        match first.as_str() {
            "Self" => None,
            "crate" | "proxmox_csi" => Some(Target::Internal(rest.to_vec())),
            "self" | "super" => {
                let mut path = module.to_vec();
                let steps = segments.iter().take_while(|s| *s == "self" || *s == "super");
                for _ in steps.clone().filter(|s| *s == "super") {
                    path.pop();
                }
                path.extend(segments[steps.count()..].iter().cloned());
                Some(Target::Internal(path))
            }
            name => match self.aliases.get(name) {
                Some((absolute, target, at)) if !seen.iter().any(|s| s == name) => {
                    seen.push(name.to_owned());
                    let path: Vec<String> = target.iter().chain(rest).cloned().collect();
                    self.resolve(*absolute, &path, at, seen)
                }
                _ => Some(Target::External(segments.to_vec())),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The paths of a snippet in `src/pve/wire.rs`, `crate::` before those of the crate.
    fn paths(text: &str) -> Vec<String> {
        paths_in(&["pve", "wire"], text)
    }

    fn paths_in(module: &[&str], text: &str) -> Vec<String> {
        let module = module.iter().map(ToString::to_string).collect();
        let shown = |import: &Import| match &import.target {
            Target::Internal(path) => format!("crate::{}", path.join("::")),
            Target::External(path) => path.join("::"),
        };
        Source::parse(module, text).imports.iter().map(shown).collect()
    }

    #[test]
    fn file_names_become_modules() {
        assert_eq!(module_of("src/lib.rs"), [""; 0]);
        assert_eq!(module_of("src/main.rs"), ["main"]);
        assert_eq!(module_of("src/bin/pve-sim.rs"), ["bin", "pve-sim"]);
        assert_eq!(module_of("src/types/mod.rs"), ["types"]);
        assert_eq!(module_of("src/host/linux/disks.rs"), ["host", "linux", "disks"]);
    }

    #[test]
    fn use_lines_are_spread_out() {
        assert_eq!(
            paths("use crate::{types::{self, VmId}, volume::attach as plug, host::*};"),
            ["crate::types", "crate::types::VmId", "crate::volume::attach", "crate::host::*"]
        );
        assert_eq!(paths("pub(crate) use ::tonic::Status;"), ["tonic::Status"]);
        assert_eq!(paths("use {std::fs, crate::sim};"), ["std::fs", "crate::sim"]);
    }

    #[test]
    fn self_and_super_are_resolved() {
        assert_eq!(paths("use super::super::volume::X;"), ["crate::volume::X"]);
        assert_eq!(paths("use super::task;"), ["crate::pve::task"]);
        assert_eq!(paths("use self::inner::X;"), ["crate::pve::wire::inner::X"]);
        assert_eq!(
            paths("mod a { mod b { use super::super::X; } use super::Y; } use super::Z;"),
            ["crate::pve::wire::X", "crate::pve::wire::Y", "crate::pve::Z"]
        );
        assert_eq!(paths("fn f() -> super::super::host::Disk { }"), ["crate::host::Disk"]);
    }

    #[test]
    fn paths_in_code_count() {
        assert_eq!(
            paths("fn f(x: &crate::sim::World) -> ::reqwest::Result<nix::Error> { crate::volume::go(x) }"),
            ["crate::sim::World", "reqwest::Result", "nix::Error", "crate::volume::go"]
        );
        assert_eq!(paths("let x = <u8 as crate::types::Parse>::parse(\"1\");"), ["crate::types::Parse"]);
        assert_eq!(paths("Vec::<crate::host::Disk>::new()"), ["Vec", "crate::host::Disk"][1..]);
        assert_eq!(paths("macro_rules! m { () => { $crate::sim::boot!() } }"), ["crate::sim::boot"]);
        assert_eq!(
            paths("fn f() { return ::nix::go(); match ::kube::x { _ => ::axum::y } }"),
            ["nix::go", "kube::x", "axum::y"]
        );
        assert_eq!(
            paths("Vec::<u8>::new().iter::<nix::X>::then(a > b, crate::sim::c)"),
            ["nix::X", "crate::sim::c"]
        );
        assert_eq!(paths("#[derive(clap::Parser)] struct A;"), ["clap::Parser"]);
    }

    #[test]
    fn other_names_do_not_hide_a_path() {
        assert_eq!(
            paths("use std::process; fn f() { process::Command::new(\"x\"); }"),
            ["std::process", "std::process::Command::new"]
        );
        assert_eq!(paths("use crate as root; use root::volume::X;"), ["crate::", "crate::volume::X"]);
        assert_eq!(
            paths("use super::super as up; fn f() { up::sim::boot(); }"),
            ["crate::", "crate::sim::boot"]
        );
        assert_eq!(paths("extern crate tonic;"), ["tonic"]);
        assert_eq!(paths("use tonic;"), ["tonic"]);
    }

    #[test]
    fn comments_and_literals_are_no_code() {
        let text = r##"
            //! crate::a::b
            /// [`crate::a::b`]
            /* crate::a::b /* nested */ crate::a::b */
            const A: &str = "crate::a::b \" crate::a::b";
            const B: &str = r#"crate::a::b " crate::a::b"#;
            const C: &[u8] = b"crate::a::b";
            const D: (char, char, u8) = ('"', '\'', b'"');
            fn f<'a>(x: &'a str) -> impl Sized + use<'a> { crate::types::ok(x) }
        "##;
        assert_eq!(paths(text), ["crate::types::ok"]);
    }

    #[test]
    fn lines_are_counted_through_comments_and_strings() {
        let source =
            Source::parse(vec!["pve".to_owned()], "/*\n*/ const A: &str = \"\n\n\";\nuse crate::sim::X;");
        assert_eq!(source.imports[0].line, 5);
    }

    #[test]
    fn test_code_is_told_apart() {
        let source = Source::parse(
            vec!["pve".to_owned()],
            "use crate::a::A;
             #[cfg(test)] use crate::{b::B, c::C};
             use crate::d::D;
             #[cfg(test)] #[path = \"x.rs\"] mod outside;
             #[cfg(all(test, unix))] mod tests { use crate::e::E; fn f() {} use super::F; }
             #[cfg(not(test))] use crate::g::G;",
        );
        let test: Vec<bool> = source.imports.iter().map(|import| import.test).collect();
        assert_eq!(test, [false, true, true, false, true, true, false]);
        assert_eq!(source.test_modules, [["pve", "outside"]]);
    }

    #[test]
    fn macro_calls_are_found_in_code_only() {
        let source =
            Source::parse(Vec::new(), "fn f() {\n    todo!() // dbg!(1)\n}\nfn todo() {} \"dbg!()\"");
        assert_eq!(source.macro_calls(&["todo", "dbg"]), [(2, "todo".to_owned())]);
    }
}
