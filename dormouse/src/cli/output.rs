//! Answers as tables or JSON.

use comfy_table::{Table, presets};
use serde::Serialize;

/// Shape of answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// For programs: what the API answered.
    Json,
}

impl Output {
    /// Prints `answer` whole as JSON, or `rows` under `columns`.
    pub fn print<const N: usize>(
        self,
        answer: &impl Serialize,
        columns: [&str; N],
        rows: impl IntoIterator<Item = [String; N]>,
    ) -> anyhow::Result<()> {
        match self {
            Output::Json => println!("{}", serde_json::to_string_pretty(answer)?),
            Output::Table => {
                let mut table = Table::new();
                table.load_style(presets::NOTHING).set_header(columns.map(str::to_uppercase));
                for row in rows {
                    table.add_row(row);
                }
                println!("{}", table.trim_fmt());
            }
        }
        Ok(())
    }
}

/// Nothing, visibly.
pub fn or_dash(text: Option<impl ToString>) -> String {
    text.map_or_else(|| "-".to_owned(), |text| text.to_string())
}
