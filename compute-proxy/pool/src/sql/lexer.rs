//! Splits SQL into words, names, texts and symbols as Postgres's scanner does (`src/backend/parser/scan.l`), as far as it
//! matters for telling words from what only looks like them.

/// One piece of a statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token<'a> {
    /// A keyword or a name without quotes, as written.
    Word(&'a [u8]),
    /// A name in double quotes, without them; a doubled quote inside is left doubled.
    Quoted(&'a [u8]),
    /// A text in quotes or dollars, without them.
    Text(&'a [u8]),
    /// A character that is none of the others.
    Symbol(u8),
    /// A number or a parameter.
    Other,
}

/// Goes through a text. What does not end (a quote, a comment) reaches to the end.
#[derive(Clone)]
pub struct Lexer<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Lexer<'a> {
    type Item = Token<'a>;

    fn next(&mut self) -> Option<Token<'a>> {
        self.skip_blanks();
        let first = *self.rest.first()?;
        Some(match first {
            b'\'' => Token::Text(self.quoted(1, false)),
            b'"' => Token::Quoted(self.quoted(1, false)),
            b'e' | b'E' if self.rest.get(1) == Some(&b'\'') => Token::Text(self.quoted(2, true)),
            b'u' | b'U' if self.rest.get(1) == Some(&b'&') && self.rest.get(2) == Some(&b'\'') => {
                Token::Text(self.quoted(3, false))
            }
            b'$' => self.dollar(),
            b'0'..=b'9' => {
                self.take_while(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.'));
                Token::Other
            }
            b'_' | b'a'..=b'z' | b'A'..=b'Z' | 0x80.. => Token::Word(self.take_while(is_word)),
            symbol => {
                self.rest = &self.rest[1..];
                Token::Symbol(symbol)
            }
        })
    }
}

impl<'a> Lexer<'a> {
    /// From the beginning.
    pub fn new(text: &'a [u8]) -> Self {
        Self { rest: text }
    }

    fn take_while(&mut self, wanted: impl Fn(u8) -> bool) -> &'a [u8] {
        let end = self.rest.iter().position(|byte| !wanted(*byte)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at(end);
        self.rest = rest;
        taken
    }

    fn skip_blanks(&mut self) {
        loop {
            match self.rest {
                [b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c, rest @ ..] => self.rest = rest,
                [b'-', b'-', ..] => {
                    self.take_while(|byte| byte != b'\n' && byte != b'\r');
                }
                [b'/', b'*', rest @ ..] => {
                    self.rest = rest;
                    self.skip_comment();
                }
                _ => return,
            }
        }
    }

    /// Behind `/*`; comments nest.
    fn skip_comment(&mut self) {
        let mut depth = 1;
        while depth > 0 {
            match self.rest {
                [b'*', b'/', rest @ ..] => (depth, self.rest) = (depth - 1, rest),
                [b'/', b'*', rest @ ..] => (depth, self.rest) = (depth + 1, rest),
                [_, rest @ ..] => self.rest = rest,
                [] => return,
            }
        }
    }

    /// From `start` bytes on up to the quote that stands before it.
    fn quoted(&mut self, start: usize, backslashes: bool) -> &'a [u8] {
        let quote = self.rest[start - 1];
        let text = &self.rest[start..];
        let mut at = 0;
        while let Some(byte) = text.get(at) {
            match byte {
                b'\\' if backslashes => at += 2,
                byte if *byte == quote && text.get(at + 1) == Some(&quote) => at += 2,
                byte if *byte == quote => break,
                _ => at += 1,
            }
        }
        let end = at.min(text.len());
        self.rest = text.get(end + 1..).unwrap_or_default();
        &text[..end]
    }

    /// `$1`, `$$…$$`, `$tag$…$tag$`.
    fn dollar(&mut self) -> Token<'a> {
        let text = self.rest;
        let tag_bytes = text[1..].iter().position(|byte| !is_word(*byte) || *byte == b'$').unwrap_or(text.len() - 1);
        let opens = text.get(1 + tag_bytes) == Some(&b'$') && !text[1..].first().is_some_and(u8::is_ascii_digit);
        if !opens {
            self.rest = &text[1..];
            self.take_while(is_word);
            return Token::Other;
        }
        let (tag, body) = text.split_at(tag_bytes + 2);
        let end = body.windows(tag.len()).position(|window| window == tag);
        self.rest = end.map_or(&[], |end| &body[end + tag.len()..]);
        Token::Text(&body[..end.unwrap_or(body.len())])
    }
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$' | 0x80..)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_told_apart() {
        let text = br#"select "a""b", 'it''s', E'\'', $1, $t$ x $t$, 1.5e3 /* c */ --d"#;
        let comma = Token::Symbol(b',');
        let tokens: Vec<_> = Lexer::new(text).collect();
        let expected = [
            Token::Word(b"select"),
            Token::Quoted(b"a\"\"b"),
            comma,
            Token::Text(b"it''s"),
            comma,
            Token::Text(b"\\'"),
            comma,
            Token::Other,
            comma,
            Token::Text(b" x "),
            comma,
            Token::Other,
        ];
        assert_eq!(tokens, expected);
    }

    #[test]
    fn what_does_not_end_reaches_to_the_end() {
        for text in ["'a", "\"a", "E'\\", "$$ a", "$a$ $b$", "/* a"] {
            assert!(Lexer::new(text.as_bytes()).count() <= 1, "{text}");
        }
    }
}
