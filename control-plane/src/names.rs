//! Made-up ids and passwords, and the rules for names that people choose.

use types::{BranchId, EndpointId, ProjectId};

use crate::problem::Problem;

const ADJECTIVES: [&str; 48] = [
    "aged",
    "ancient",
    "autumn",
    "billowing",
    "bold",
    "broad",
    "calm",
    "cold",
    "cool",
    "crimson",
    "damp",
    "dark",
    "dawn",
    "delicate",
    "dry",
    "empty",
    "falling",
    "flat",
    "fragrant",
    "frosty",
    "gentle",
    "green",
    "hidden",
    "holy",
    "icy",
    "late",
    "lingering",
    "little",
    "long",
    "lucky",
    "misty",
    "morning",
    "muddy",
    "nameless",
    "old",
    "patient",
    "plain",
    "polished",
    "proud",
    "purple",
    "quiet",
    "rapid",
    "restless",
    "silent",
    "sleepy",
    "still",
    "sweet",
    "wandering",
];
const NOUNS: [&str; 48] = [
    "bird",
    "breeze",
    "brook",
    "bush",
    "butterfly",
    "cherry",
    "cloud",
    "darkness",
    "dawn",
    "dew",
    "dream",
    "dust",
    "feather",
    "field",
    "fire",
    "firefly",
    "flower",
    "fog",
    "forest",
    "frog",
    "frost",
    "glade",
    "glitter",
    "grass",
    "hazel",
    "haze",
    "hill",
    "lake",
    "leaf",
    "meadow",
    "moon",
    "morning",
    "mountain",
    "night",
    "nest",
    "paper",
    "pine",
    "pond",
    "rain",
    "resonance",
    "river",
    "sea",
    "shadow",
    "shape",
    "silence",
    "sky",
    "smoke",
    "snow",
];
const LOWER_ALPHANUMERIC: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
const PASSWORD_ALPHABET: &[u8; 62] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";
/// 24 letters and digits: about 142 bits.
const PASSWORD_LENGTH: usize = 24;
/// `NAMEDATALEN - 1` of a stock build: longer names would be cut by Postgres.
const POSTGRES_NAME_MAX_BYTES: usize = 63;
const TITLE_MAX_CHARS: usize = 256;
/// Postgres's own and the one that Dormouse itself logs in as.
const RESERVED_ROLES: [&str; 4] = ["dormouse_admin", "public", "none", "postgres"];
const RESERVED_DATABASES: [&str; 3] = ["postgres", "template0", "template1"];

fn pick<const N: usize>(words: &[&'static str; N]) -> &'static str {
    words[rand::random_range(0..N)]
}

fn random_text(alphabet: &[u8], length: usize) -> String {
    (0..length).map(|_| char::from(alphabet[rand::random_range(0..alphabet.len())])).collect()
}

/// Such as `quiet-sea-12345678`.
pub fn project_id() -> ProjectId {
    let text = format!("{}-{}-{}", pick(&ADJECTIVES), pick(&NOUNS), random_text(b"0123456789", 8));
    ProjectId::new(&text).expect("words and digits make a valid id")
}

/// Such as `br-quiet-sea-a1b2c3d4`.
pub fn branch_id() -> BranchId {
    let text = format!("br-{}-{}-{}", pick(&ADJECTIVES), pick(&NOUNS), random_text(LOWER_ALPHANUMERIC, 8));
    BranchId::new(&text).expect("words and digits make a valid id")
}

/// Such as `ep-quiet-sea-a1b2c3d4`. Never ends in `-pooler`, which means something in host names.
pub fn endpoint_id() -> EndpointId {
    let text = format!("ep-{}-{}-{}", pick(&ADJECTIVES), pick(&NOUNS), random_text(LOWER_ALPHANUMERIC, 8));
    EndpointId::new(&text).expect("words and digits make a valid id")
}

/// A new password of letters and digits: nothing to quote or to encode in a URI.
pub fn password() -> String {
    random_text(PASSWORD_ALPHABET, PASSWORD_LENGTH)
}

/// Postgres's stored form of a password (`SCRAM-SHA-256$…`). Takes a few milliseconds.
pub fn scram_verifier(password: &str) -> String {
    postgres_protocol::password::scram_sha_256(password.as_bytes())
}

/// Checks what people call a project, a branch or an endpoint.
pub fn check_title(what: &str, name: &str) -> Result<String, Problem> {
    let count = name.chars().count();
    if count == 0 || count > TITLE_MAX_CHARS || name.chars().any(char::is_control) || name.trim() != name {
        let message = format!(
            "the {what}'s name must have 1 to {TITLE_MAX_CHARS} characters, no control characters and no space at its ends"
        );
        return Err(Problem::Invalid(message));
    }
    Ok(name.to_owned())
}

fn check_postgres_name(what: &str, name: &str) -> Result<(), Problem> {
    let good = (1..=POSTGRES_NAME_MAX_BYTES).contains(&name.len()) && !name.chars().any(char::is_control);
    if good {
        return Ok(());
    }
    let message = format!(
        "the {what}'s name must have 1 to {POSTGRES_NAME_MAX_BYTES} bytes and no control characters (Postgres would cut it)"
    );
    Err(Problem::Invalid(message))
}

/// Checks a new role's name.
pub fn check_role(name: &str) -> Result<(), Problem> {
    check_postgres_name("role", name)?;
    if RESERVED_ROLES.contains(&name) || name.starts_with("pg_") {
        return Err(Problem::Invalid(format!("the role name {name:?} is reserved")));
    }
    Ok(())
}

/// Checks a new database's name.
pub fn check_database(name: &str) -> Result<(), Problem> {
    check_postgres_name("database", name)?;
    if RESERVED_DATABASES.contains(&name) {
        return Err(Problem::Invalid(format!("the database name {name:?} is reserved")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_bounded() {
        assert!(check_role("app").is_ok() && check_role("Ünïcode role").is_ok());
        for bad in ["", "pg_monitor", "dormouse_admin", "a\0b", &"x".repeat(64)] {
            assert!(check_role(bad).is_err(), "{bad:?}");
        }
        for bad in ["", "template1", "postgres", "a\nb"] {
            assert!(check_database(bad).is_err(), "{bad:?}");
        }
        for bad in ["", " a", "a ", "a\u{7}", &"x".repeat(257)] {
            assert!(check_title("branch", bad).is_err(), "{bad:?}");
        }
        assert!(check_title("branch", "feature/new thing").is_ok());
    }

    #[test]
    fn made_up_things_are_valid_and_differ() {
        assert_ne!(project_id(), project_id());
        assert!(branch_id().as_str().starts_with("br-") && endpoint_id().as_str().starts_with("ep-"));
        assert!(password().len() == PASSWORD_LENGTH && password() != password());
        assert!(scram_verifier("secret").starts_with("SCRAM-SHA-256$4096:"));
    }
}
