//! Postgres's messages as the JSON that node-postgres would make of them. Pure.

use std::{collections::HashMap, io::Write as _};

use connection_pool::frame;
use serde::Serialize;

use super::{
    error::SqlError,
    request::Shape,
    value::{Column, write_string},
};

/// Takes the answer to one query, or to the statements of a batch between `BEGIN` and `COMMIT`.
pub struct Answer {
    shape: Shape,
    /// Results that are to be shown; all others are the batch's own statements.
    shown: std::ops::Range<usize>,
    batch: bool,
    limit: usize,
    statement: usize,
    columns: Vec<ColumnPlan>,
    described: bool,
    rows: usize,
    /// Postgres has begun with a statement.
    begun: bool,
    json: Vec<u8>,
    error: Option<SqlError>,
}

/// How a column's values are written in a row.
struct ColumnPlan {
    column: Column,
    /// `"name":`, for rows that are objects; empty when a later column has the same name.
    key: Vec<u8>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Field<'a> {
    name: &'a str,
    #[serde(rename = "dataTypeID")]
    data_type_id: u32,
    #[serde(rename = "tableID")]
    table_id: u32,
    #[serde(rename = "columnID")]
    column_id: i16,
    data_type_size: i16,
    data_type_modifier: i32,
    format: &'static str,
}

impl Answer {
    /// For one query. The JSON may have `limit` bytes.
    pub fn single(shape: Shape, limit: usize) -> Self {
        Self::new(shape, 0..1, false, limit)
    }

    /// For one query between the `BEGIN` and `COMMIT` of a transaction.
    pub fn single_in_transaction(shape: Shape, limit: usize) -> Self {
        Self::new(shape, 1..2, false, limit)
    }

    /// For a batch of `count` queries.
    pub fn batch(shape: Shape, count: usize, limit: usize) -> Self {
        let mut answer = Self::new(shape, 1..count + 1, true, limit);
        answer.json.extend_from_slice(b"{\"results\":[");
        answer
    }

    /// The same behind `count` more statements, which are not shown.
    pub fn after(mut self, count: usize) -> Self {
        self.shown = self.shown.start + count..self.shown.end + count;
        self
    }

    fn new(shape: Shape, shown: std::ops::Range<usize>, batch: bool, limit: usize) -> Self {
        Self {
            shape,
            shown,
            batch,
            limit,
            statement: 0,
            columns: Vec::new(),
            described: false,
            rows: 0,
            begun: false,
            json: Vec::new(),
            error: None,
        }
    }

    /// Takes one message. Errors when the answer cannot be given and no more of it should be read.
    pub fn take(&mut self, kind: u8, body: &[u8]) -> Result<(), SqlError> {
        let shown = self.shown.contains(&self.statement) && self.error.is_none();
        match kind {
            b'E' => {
                let error = SqlError::from_postgres(body);
                self.error.get_or_insert(if self.begun { error.after_begin() } else { error });
                // What was made so far is of no use any more.
                self.json = Vec::new();
            }
            b'2' => self.begun = true,
            b'T' if shown => self.begin(Some(body)).ok_or_else(unreadable)?,
            b'n' if shown => self.begin(None).ok_or_else(unreadable)?,
            b'D' if shown => self.row(body).ok_or_else(unreadable)?,
            b'C' | b'I' => {
                if shown {
                    self.end(if kind == b'C' { Some(body) } else { None });
                }
                self.statement += 1;
            }
            b'H' | b'G' | b'W' => {
                let error = SqlError::new("0A000", "COPY from or to the client does not work over HTTP");
                return Err(error.with_hint("Use the WebSocket or a connection to the Postgres port."));
            }
            _ => {}
        }
        if self.json.len() > self.limit {
            let message = format!("the answer is larger than {} bytes", self.limit);
            let hint = "Ask for fewer rows or columns, or use the WebSocket or a connection to the Postgres port.";
            return Err(SqlError::new("54000", message).with_hint(hint));
        }
        Ok(())
    }

    /// Bytes of the JSON so far.
    pub fn bytes(&self) -> usize {
        self.json.len()
    }

    /// The answer's JSON, or the error that came.
    pub fn finish(mut self) -> Result<Vec<u8>, SqlError> {
        if let Some(error) = self.error {
            return Err(error);
        }
        if self.statement < self.shown.end {
            return Err(unreadable());
        }
        if self.batch {
            self.json.extend_from_slice(b"]}");
        }
        Ok(self.json)
    }

    fn begin(&mut self, description: Option<&[u8]>) -> Option<()> {
        if self.statement > self.shown.start {
            self.json.push(b',');
        }
        self.json.extend_from_slice(b"{\"fields\":[");
        self.columns.clear();
        if let Some(description) = description {
            self.describe(description)?;
        }
        self.json.extend_from_slice(b"],\"rows\":[");
        self.described = true;
        self.rows = 0;
        Some(())
    }

    fn describe(&mut self, mut body: &[u8]) -> Option<()> {
        let count = u16::from_be_bytes(take(&mut body)?);
        let mut names = Vec::with_capacity(usize::from(count));
        for index in 0..count {
            let name = String::from_utf8_lossy(frame::take_string(&mut body)?);
            let field = Field {
                name: &name,
                table_id: u32::from_be_bytes(take(&mut body)?),
                column_id: i16::from_be_bytes(take(&mut body)?),
                data_type_id: u32::from_be_bytes(take(&mut body)?),
                data_type_size: i16::from_be_bytes(take(&mut body)?),
                data_type_modifier: i32::from_be_bytes(take(&mut body)?),
                format: match i16::from_be_bytes(take(&mut body)?) {
                    0 => "text",
                    _ => return None,
                },
            };
            if index > 0 {
                self.json.push(b',');
            }
            serde_json::to_writer(&mut self.json, &field).ok()?;
            let column = if self.shape.raw_text { Column::RAW } else { Column::of(field.data_type_id) };
            self.columns.push(ColumnPlan { column, key: Vec::new() });
            names.push(name);
        }
        if !self.shape.arrays {
            // Of columns with the same name the last one counts, as in node-postgres.
            let last: HashMap<_, _> = names.iter().enumerate().map(|(index, name)| (name, index)).collect();
            for index in last.values() {
                let key = &mut self.columns[*index].key;
                write_string(names[*index].as_bytes(), key);
                key.push(b':');
            }
        }
        Some(())
    }

    fn row(&mut self, mut body: &[u8]) -> Option<()> {
        let Self { shape, columns, json, rows, described, .. } = self;
        if !*described || usize::from(u16::from_be_bytes(take(&mut body)?)) != columns.len() {
            return None;
        }
        let (open, close) = if shape.arrays { (b'[', b']') } else { (b'{', b'}') };
        if *rows > 0 {
            json.push(b',');
        }
        json.push(open);
        let mut first = true;
        for ColumnPlan { column, key } in columns {
            let length = i32::from_be_bytes(take(&mut body)?);
            let value = match usize::try_from(length) {
                Ok(length) => {
                    let (value, rest) = body.split_at_checked(length)?;
                    body = rest;
                    Some(value)
                }
                Err(_) => None,
            };
            if !shape.arrays && key.is_empty() {
                continue;
            }
            if !std::mem::take(&mut first) {
                json.push(b',');
            }
            json.extend_from_slice(key);
            match value {
                Some(value) => column.write(value, json),
                None => json.extend_from_slice(b"null"),
            }
        }
        json.push(close);
        *rows += 1;
        Some(())
    }

    /// The end of a statement. `tag`: a `CommandComplete`'s; `None`: the query was empty.
    fn end(&mut self, tag: Option<&[u8]>) {
        if !self.described {
            // Postgres describes everything that it executes.
            self.begin(None);
        }
        let tag = tag.map(|tag| String::from_utf8_lossy(tag.strip_suffix(b"\0").unwrap_or(tag)));
        let (command, count) = tag.as_deref().map_or((None, None), command_and_count);
        let json = &mut self.json;
        json.extend_from_slice(b"],\"command\":");
        match command {
            Some(command) => write_string(command.as_bytes(), json),
            None => json.extend_from_slice(b"null"),
        }
        json.extend_from_slice(b",\"rowCount\":");
        match count {
            // Writing to memory does not fail.
            Some(count) => drop(write!(json, "{count}")),
            None => json.extend_from_slice(b"null"),
        }
        json.extend_from_slice(if self.shape.arrays { b",\"rowAsArray\":true}" } else { b",\"rowAsArray\":false}" });
        self.described = false;
    }
}

/// The first word of a command tag, and the last when it is a number: `INSERT 0 5`, `SELECT 1`, `CREATE TABLE`.
fn command_and_count(tag: &str) -> (Option<&str>, Option<u64>) {
    let mut words = tag.split(' ');
    let command = words.next().filter(|word| !word.is_empty());
    (command, words.next_back().and_then(|word| word.parse().ok()))
}

fn take<const N: usize>(body: &mut &[u8]) -> Option<[u8; N]> {
    let (head, rest) = body.split_first_chunk::<N>()?;
    *body = rest;
    Some(*head)
}

fn unreadable() -> SqlError {
    SqlError::new("08P01", "the server's answer cannot be read")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn description(columns: &[(&str, u32)]) -> Vec<u8> {
        let mut body = (columns.len() as u16).to_be_bytes().to_vec();
        for (name, type_id) in columns {
            body.extend_from_slice(name.as_bytes());
            body.extend_from_slice(&[0, 0, 0, 0, 9, 0, 2]);
            body.extend_from_slice(&type_id.to_be_bytes());
            body.extend_from_slice(&[0, 4, 255, 255, 255, 255, 0, 0]);
        }
        body
    }

    fn row(values: &[Option<&str>]) -> Vec<u8> {
        let mut body = (values.len() as u16).to_be_bytes().to_vec();
        for value in values {
            body.extend_from_slice(&value.map_or(-1, |value| value.len() as i32).to_be_bytes());
            body.extend_from_slice(value.unwrap_or("").as_bytes());
        }
        body
    }

    fn finished(answer: Answer) -> Value {
        serde_json::from_slice(&answer.finish().expect("an answer")).expect("JSON")
    }

    fn select(shape: Shape) -> Value {
        let mut answer = Answer::single(shape, 10_000);
        answer.take(b'1', b"").expect("taken");
        answer.take(b'T', &description(&[("a", 23), ("b", 25), ("a", 16)])).expect("taken");
        answer.take(b'D', &row(&[Some("1"), None, Some("t")])).expect("taken");
        answer.take(b'D', &row(&[Some("2"), Some("x"), Some("f")])).expect("taken");
        answer.take(b'C', b"SELECT 2\0").expect("taken");
        finished(answer)
    }

    #[test]
    fn rows_have_the_shape_that_was_asked_for() {
        let objects = select(Shape::default());
        assert_eq!(objects["rows"], json!([{"b": null, "a": true}, {"b": "x", "a": false}]));
        let field = json!({"name": "a", "dataTypeID": 23, "tableID": 9, "columnID": 2, "dataTypeSize": 4,
            "dataTypeModifier": -1, "format": "text"});
        assert_eq!(objects["fields"][0], field);
        assert_eq!(objects["command"], "SELECT");
        assert_eq!((&objects["rowCount"], &objects["rowAsArray"]), (&json!(2), &json!(false)));
        let raw = select(Shape { raw_text: true, arrays: true });
        assert_eq!(raw["rows"], json!([["1", null, "t"], ["2", "x", "f"]]));
        assert_eq!(raw["rowAsArray"], true);
    }

    #[test]
    fn a_batch_shows_its_own_statements_only() {
        let mut answer = Answer::batch(Shape::default(), 2, 10_000);
        for (kind, body) in [
            (b'n', &b""[..]),
            (b'C', b"BEGIN\0"),
            (b'n', b""),
            (b'C', b"INSERT 0 5\0"),
            (b'n', b""),
            (b'I', b""),
            (b'n', b""),
            (b'C', b"COMMIT\0"),
        ] {
            answer.take(kind, body).expect("taken");
        }
        let result = |command: Value, count: Value| json!({"fields": [], "rows": [], "command": command, "rowCount": count, "rowAsArray": false});
        let results = [result("INSERT".into(), 5.into()), result(Value::Null, Value::Null)];
        assert_eq!(finished(answer), json!({ "results": results }));
        let mut empty = Answer::batch(Shape::default(), 0, 100);
        assert!(Answer::batch(Shape::default(), 0, 100).finish().is_err(), "not even BEGIN was answered");
        empty.take(b'C', b"BEGIN\0").expect("taken");
        assert_eq!(finished(empty), json!({"results": []}));
    }

    #[test]
    fn an_error_takes_the_place_of_what_came_before() {
        let mut answer = Answer::single(Shape::default(), 10_000);
        answer.take(b'T', &description(&[("a", 23)])).expect("taken");
        answer.take(b'E', b"SERROR\0C22012\0Mdivision by zero\0\0").expect("taken");
        assert_eq!(answer.finish(), Err(SqlError::from_postgres(b"SERROR\0C22012\0Mdivision by zero\0\0")));
    }

    #[test]
    fn an_answer_has_a_limit() {
        let mut answer = Answer::single(Shape::default(), 300);
        answer.take(b'T', &description(&[("a", 25)])).expect("small");
        let rows = (0..20).map(|_| answer.take(b'D', &row(&[Some("0123456789")])));
        assert!(rows.into_iter().any(|taken| taken.is_err()));
    }

    #[test]
    fn tags_are_read() {
        assert_eq!(command_and_count("INSERT 0 5"), (Some("INSERT"), Some(5)));
        assert_eq!(command_and_count("CREATE TABLE"), (Some("CREATE"), None));
        assert_eq!(command_and_count("SELECT 18446744073709551615"), (Some("SELECT"), Some(u64::MAX)));
        assert_eq!(command_and_count(""), (None, None));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(messages: Vec<(u8, Vec<u8>)>, kinds in "[TDCnIE]{0,10}", body: Vec<u8>) {
            let mut answer = Answer::single(Shape::default(), 10_000);
            for (kind, body) in messages.iter().map(|(kind, body)| (*kind, &body[..])).chain(kinds.bytes().map(|kind| (kind, &body[..]))) {
                if answer.take(kind, body).is_err() {
                    return Ok(());
                }
            }
            let _ = answer.finish();
        }
    }
}
