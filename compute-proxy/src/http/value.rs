//! Values of Postgres's text format as JSON, as node-postgres would read them. Pure.

use postgres_types::{Kind, Type};

/// Levels of braces in an array, of which Postgres has at most six.
const DEPTH_MAX: usize = 8;

/// How values of a column are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// As a JSON string.
    Text,
    /// `t` and `f`.
    Bool,
    /// As it is, where that is a JSON number; `NaN` and infinities as strings.
    Number,
    /// As it is: Postgres has checked it.
    Json,
}

/// How a type's values are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Column {
    format: Format,
    /// What stands between elements; `None`: no array.
    delimiter: Option<u8>,
}

impl Column {
    /// Values as Postgres's text.
    pub const RAW: Self = Self { format: Format::Text, delimiter: None };

    /// From a type's id. Types of extensions, and the user's own, are text.
    pub fn of(type_id: u32) -> Self {
        let Some(known) = Type::from_oid(type_id) else { return Self::RAW };
        match known.kind() {
            Kind::Array(element) => {
                let delimiter = if *element == Type::BOX { b';' } else { b',' };
                Self { format: format(element), delimiter: Some(delimiter) }
            }
            _ => Self { format: format(&known), delimiter: None },
        }
    }

    /// Writes a value.
    pub fn write(self, text: &[u8], out: &mut Vec<u8>) {
        match self.delimiter {
            None => write_scalar(self.format, text, out),
            Some(delimiter) => {
                let start = out.len();
                if write_array(self.format, delimiter, text, out).is_none() {
                    out.truncate(start);
                    write_string(text, out);
                }
            }
        }
    }
}

fn format(known: &Type) -> Format {
    match *known {
        Type::BOOL => Format::Bool,
        Type::INT2 | Type::INT4 | Type::OID | Type::FLOAT4 | Type::FLOAT8 => Format::Number,
        Type::JSON | Type::JSONB => Format::Json,
        _ => Format::Text,
    }
}

fn write_scalar(format: Format, text: &[u8], out: &mut Vec<u8>) {
    match (format, text) {
        (Format::Bool, b"t") => out.extend_from_slice(b"true"),
        (Format::Bool, b"f") => out.extend_from_slice(b"false"),
        (Format::Number, [.., b'0'..=b'9']) | (Format::Json, _) => out.extend_from_slice(text),
        _ => write_string(text, out),
    }
}

/// A JSON string. What is not UTF-8 is replaced: the session's encoding is UTF-8 unless the client has changed it.
pub fn write_string(text: &[u8], out: &mut Vec<u8>) {
    let text = String::from_utf8_lossy(text);
    // Writing to a Vec cannot fail.
    let _ = serde_json::to_writer(out, text.as_ref());
}

/// An array's text, which may begin with its bounds: `[0:1]={a,b}`. `None`: it is not one.
fn write_array(format: Format, delimiter: u8, text: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let start = text.iter().position(|byte| *byte == b'{')?;
    if start > 0 && !(text.starts_with(b"[") && text[..start].ends_with(b"=")) {
        return None;
    }
    let mut array = Array { format, delimiter, rest: &text[start..] };
    array.write(0, out)?;
    array.rest.is_empty().then_some(())
}

struct Array<'a> {
    format: Format,
    delimiter: u8,
    rest: &'a [u8],
}

impl Array<'_> {
    fn write(&mut self, depth: usize, out: &mut Vec<u8>) -> Option<()> {
        if depth == DEPTH_MAX || !self.take(b'{') {
            return None;
        }
        out.push(b'[');
        if !self.take(b'}') {
            loop {
                match self.rest.first()? {
                    b'{' => self.write(depth + 1, out)?,
                    b'"' => self.quoted(out)?,
                    _ => self.bare(out)?,
                }
                if self.take(b'}') {
                    break;
                }
                if !self.take(self.delimiter) {
                    return None;
                }
                out.push(b',');
            }
        }
        out.push(b']');
        Some(())
    }

    fn take(&mut self, byte: u8) -> bool {
        let found = self.rest.first() == Some(&byte);
        if found {
            self.rest = &self.rest[1..];
        }
        found
    }

    fn quoted(&mut self, out: &mut Vec<u8>) -> Option<()> {
        let mut element = Vec::new();
        let mut at = 1;
        loop {
            match *self.rest.get(at)? {
                b'"' => break,
                b'\\' => {
                    element.push(*self.rest.get(at + 1)?);
                    at += 2;
                }
                other => {
                    element.push(other);
                    at += 1;
                }
            }
        }
        self.rest = &self.rest[at + 1..];
        write_scalar(self.format, &element, out);
        Some(())
    }

    fn bare(&mut self, out: &mut Vec<u8>) -> Option<()> {
        let end = self.rest.iter().position(|byte| *byte == self.delimiter || *byte == b'}')?;
        let (element, rest) = self.rest.split_at(end);
        self.rest = rest;
        if element.eq_ignore_ascii_case(b"null") {
            out.extend_from_slice(b"null");
        } else {
            write_scalar(self.format, element, out);
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn json(known: &Type, text: &str) -> String {
        let mut out = Vec::new();
        Column::of(known.oid()).write(text.as_bytes(), &mut out);
        String::from_utf8(out).expect("UTF-8")
    }

    #[test]
    fn values_are_written_by_type() {
        for (known, text, wanted) in [
            (Type::BOOL, "t", "true"),
            (Type::INT4, "-5", "-5"),
            (Type::INT8, "9007199254740993", "\"9007199254740993\""),
            (Type::FLOAT8, "1e+20", "1e+20"),
            (Type::FLOAT8, "NaN", "\"NaN\""),
            (Type::FLOAT4, "-Infinity", "\"-Infinity\""),
            (Type::NUMERIC, "1.50", "\"1.50\""),
            (Type::JSONB, r#"{"a": [1]}"#, r#"{"a": [1]}"#),
            (Type::TEXT, "a\"\n", r#""a\"\n""#),
            (Type::INT4_ARRAY, "{}", "[]"),
            (Type::INT4_ARRAY, "{{1,NULL},{3,4}}", "[[1,null],[3,4]]"),
            (Type::INT4_ARRAY, "[0:1]={1,2}", "[1,2]"),
            (Type::TEXT_ARRAY, r#"{a b,"c,\"\\}",NULL,"NULL",""}"#, r#"["a b","c,\"\\}",null,"NULL",""]"#),
            (Type::JSONB_ARRAY, r#"{"{\"a\": 1}"}"#, r#"[{"a": 1}]"#),
            (Type::BOX_ARRAY, "{(1,1),(0,0);(2,2),(1,1)}", r#"["(1,1),(0,0)","(2,2),(1,1)"]"#),
            (Type::BOOL_ARRAY, "{t,f}", "[true,false]"),
            (Type::INT4_ARRAY, "{1,2", r#""{1,2""#),
        ] {
            assert_eq!(json(&known, text), wanted, "{known} {text}");
        }
        let mut out = Vec::new();
        Column::of(99_999).write(b"{1}", &mut out);
        assert_eq!(out, br#""{1}""#);
    }

    proptest! {
        #[test]
        fn anything_in_a_text_array_is_json(text in "[{},\"\\\\a0;= ]{0,40}") {
            let mut out = Vec::new();
            Column::of(Type::TEXT_ARRAY.oid()).write(text.as_bytes(), &mut out);
            prop_assert!(serde_json::from_slice::<serde_json::Value>(&out).is_ok(), "{:?}", String::from_utf8_lossy(&out));
        }
    }
}
