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

/// A size for people, in a unit of three digits or fewer.
pub fn bytes(size: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let (mut value, mut unit) = (size as f64, 0);
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value >= 99.5 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// Nothing, visibly.
pub fn or_dash(text: Option<impl ToString>) -> String {
    text.map_or_else(|| "-".to_owned(), |text| text.to_string())
}
