//! Parameters of a query: JSON values as Postgres's text format. Pure.

use serde_json::value::RawValue;

/// Dimensions that an array of Postgres may have (`MAXDIM`).
const DIMENSIONS_MAX: usize = 6;

/// Appends a parameter as the field of a `Bind` message: its length and text, or -1 for NULL.
///
/// Strings stand for themselves, numbers and booleans are written as JSON writes them, an object is its JSON text, and an
/// array becomes an array of Postgres: for a `json` parameter that is an array, send its text.
pub fn write_parameter(value: &RawValue, body: &mut Vec<u8>) -> Result<(), ParameterError> {
    let text = value.get();
    match kind(text) {
        Kind::Null => {
            body.extend_from_slice(&(-1_i32).to_be_bytes());
            Ok(())
        }
        Kind::String => write_sized(string(text)?.as_bytes(), body),
        Kind::Array => {
            let mut array = Vec::new();
            write_array(text, 1, &mut array)?;
            write_sized(&array, body)
        }
        Kind::Plain => write_sized(text.as_bytes(), body),
    }
}

/// Kinds of JSON values, as far as they are written differently.
enum Kind {
    Null,
    String,
    Array,
    /// Numbers, booleans and objects: their JSON text.
    Plain,
}

fn kind(text: &str) -> Kind {
    match text.as_bytes().first() {
        Some(b'n') => Kind::Null,
        Some(b'"') => Kind::String,
        Some(b'[') => Kind::Array,
        _ => Kind::Plain,
    }
}

fn string(text: &str) -> Result<String, ParameterError> {
    let string: String = serde_json::from_str(text).map_err(|_| ParameterError::Malformed)?;
    if string.contains('\0') { Err(ParameterError::Zero) } else { Ok(string) }
}

fn write_sized(text: &[u8], body: &mut Vec<u8>) -> Result<(), ParameterError> {
    let bytes = i32::try_from(text.len()).map_err(|_| ParameterError::TooLong)?;
    body.extend_from_slice(&bytes.to_be_bytes());
    body.extend_from_slice(text);
    Ok(())
}

/// An array literal: `{1,"a b",NULL,{…}}`.
fn write_array(text: &str, depth: usize, array: &mut Vec<u8>) -> Result<(), ParameterError> {
    if depth > DIMENSIONS_MAX {
        return Err(ParameterError::TooDeep);
    }
    let elements: Vec<&RawValue> = serde_json::from_str(text).map_err(|_| ParameterError::Malformed)?;
    array.push(b'{');
    for (index, element) in elements.into_iter().enumerate() {
        if index > 0 {
            array.push(b',');
        }
        let element = element.get();
        match kind(element) {
            Kind::Null => array.extend_from_slice(b"NULL"),
            Kind::String => write_quoted(&string(element)?, array),
            Kind::Array => write_array(element, depth + 1, array)?,
            Kind::Plain => write_quoted(element, array),
        }
    }
    array.push(b'}');
    Ok(())
}

fn write_quoted(text: &str, array: &mut Vec<u8>) {
    array.push(b'"');
    for byte in text.bytes() {
        if matches!(byte, b'"' | b'\\') {
            array.push(b'\\');
        }
        array.push(byte);
    }
    array.push(b'"');
}

/// Why a value cannot be a parameter. The texts are for the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ParameterError {
    /// Not JSON, or a string with half a surrogate pair.
    #[error("a parameter is not valid JSON")]
    Malformed,
    /// Postgres has no such character.
    #[error("invalid byte sequence for encoding \"UTF8\": 0x00")]
    Zero,
    /// Over 2 GiB.
    #[error("a parameter is too long")]
    TooLong,
    /// Postgres's own message.
    #[error("number of array dimensions exceeds the maximum allowed (6)")]
    TooDeep,
}

impl ParameterError {
    /// SQLSTATE, as Postgres would give.
    pub fn sqlstate(self) -> &'static str {
        match self {
            Self::Malformed => "22P02",
            Self::Zero => "22021",
            Self::TooLong | Self::TooDeep => "54000",
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(json: &str) -> Result<Option<String>, ParameterError> {
        let value: Box<RawValue> = serde_json::from_str(json).expect("JSON");
        let mut body = Vec::new();
        write_parameter(&value, &mut body)?;
        let (length, text) = body.split_first_chunk::<4>().expect("a length");
        let length = i32::from_be_bytes(*length);
        assert!(length == -1 && text.is_empty() || length as usize == text.len());
        Ok((length >= 0).then(|| String::from_utf8(text.to_vec()).expect("UTF-8")))
    }

    #[test]
    fn values_are_written_as_postgres_reads_them() {
        for (json, text) in [
            ("null", None),
            ("true", Some("true")),
            ("12345678901234567890123.50", Some("12345678901234567890123.50")),
            (r#""a\u00e4\"""#, Some("aä\"")),
            (r#""""#, Some("")),
            (r#"{"b":[1, null],"a":1e5}"#, Some(r#"{"b":[1, null],"a":1e5}"#)),
            ("[]", Some("{}")),
            (r#"[1, null, "a\"b\\", [true, {"x":"y"}]]"#, Some(r#"{"1",NULL,"a\"b\\",{"true","{\"x\":\"y\"}"}}"#)),
        ] {
            assert_eq!(written(json), Ok(text.map(str::to_owned)), "{json}");
        }
    }

    #[test]
    fn impossible_values_are_refused() {
        assert_eq!(written(r#""\u0000""#), Err(ParameterError::Zero));
        assert_eq!(written(r#"["\u0000"]"#), Err(ParameterError::Zero));
        assert_eq!(written(&format!("{}{}", "[".repeat(6), "]".repeat(6))), Ok(Some("{{{{{{}}}}}}".to_owned())));
        assert_eq!(written(&format!("{}{}", "[".repeat(90), "]".repeat(90))), Err(ParameterError::TooDeep));
    }

    proptest! {
        #[test]
        fn a_quoted_element_never_ends_early(text in "\\PC{0,40}") {
            let mut quoted = Vec::new();
            write_quoted(&text, &mut quoted);
            let inner = std::str::from_utf8(&quoted[1..quoted.len() - 1]).expect("UTF-8");
            let mut back = String::new();
            let mut characters = inner.chars();
            while let Some(character) = characters.next() {
                prop_assert_ne!(character, '"');
                back.push(if character == '\\' { characters.next().expect("escaped") } else { character });
            }
            prop_assert_eq!(back, text);
        }
    }
}
