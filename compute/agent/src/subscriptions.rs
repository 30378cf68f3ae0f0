//! A child has its ancestor's subscriptions, and the ancestor goes on with them: two of a branch's computes would take the
//! publisher's changes from each other. A first start disables them, in a Postgres that cannot run any. The common branch has
//! none, which a look at the size of `pg_subscription` tells while the data directory is being written.

use control_plane_api::compute::ComputeSpec;
use pageserver_client::{ClientError, PageserverClient};
use tokio::task::JoinHandle;
use types::{BranchRef, ForkNumber, Oid, RelTag, oids};
use wire::pageserver::{BaseFiles, ReadLsn};

use crate::{
    StartError,
    asking::patiently,
    catalog::{ADMIN_DATABASE, connect},
    start::Compute,
    stop,
};

/// Settings under which no subscription runs: there is no launcher.
pub const HELD: &[&str] = &["max_logical_replication_workers=0"];

/// The catalogue of subscriptions, of all databases (`SubscriptionRelationId` in `catalog/pg_subscription.h`).
const PG_SUBSCRIPTION: Oid = 6100;

/// The shared catalogues' files.
const RELATION_MAP: &str = "global/pg_filenode.map";

/// The first four bytes of a relation map (`RELMAPPER_FILEMAGIC` in `utils/cache/relmapper.c`).
const RELATION_MAP_MAGIC: u32 = 0x0059_2717;

/// Commits count at once, whatever the branch's settings are; a prepared transaction that has the row is not waited for.
const SESSION: &str = "SET synchronous_commit = on; SET lock_timeout = '10s'";

const DISABLE: &str = "UPDATE pg_catalog.pg_subscription SET subenabled = false WHERE subenabled";

/// A question on its way to the pageserver; `None`: there is nothing to ask.
pub type Looking = Option<JoinHandle<Result<bool, ClientError>>>;

/// Begins to ask whether there may be subscriptions, if they are to be disabled.
pub fn look(pageserver: PageserverClient, spec: &ComputeSpec, base: &BaseFiles) -> Result<Looking, StartError> {
    if !spec.disable_subscriptions {
        return Ok(None);
    }
    let map = base.files.iter().find(|file| file.path == RELATION_MAP);
    let rel = map.and_then(|map| mapped(&map.content, PG_SUBSCRIPTION)).ok_or_else(no_such_catalogue)?;
    let rel = RelTag { spc: oids::GLOBAL_TABLESPACE, db: 0, rel, fork: ForkNumber::Main };
    let at = ReadLsn { request: base.lsn, not_modified_since: base.lsn };
    Ok(Some(tokio::spawn(has_blocks(pageserver, spec.branch.clone(), rel, at))))
}

async fn has_blocks(
    pageserver: PageserverClient,
    branch: BranchRef,
    rel: RelTag,
    at: ReadLsn,
) -> Result<bool, ClientError> {
    let size = patiently("the size of pg_subscription", at.request, || pageserver.rel_size(&branch, rel, at)).await?;
    Ok(size != Some(0))
}

/// The answer.
pub async fn may_exist(looking: Looking) -> Result<bool, StartError> {
    let Some(looking) = looking else { return Ok(false) };
    let answer = looking.await.map_err(|error| StartError::Subscriptions(error.to_string()))?;
    answer.map_err(|error| StartError::Subscriptions(error.to_string()))
}

fn no_such_catalogue() -> StartError {
    StartError::Subscriptions(format!("{RELATION_MAP} does not tell where pg_subscription is"))
}

/// The file number of a mapped catalogue (`RelMapFile` in `utils/cache/relmapper.c`: a magic number, how many there are, and
/// pairs of a catalogue's id and its file's number).
fn mapped(map: &[u8], catalogue: Oid) -> Option<Oid> {
    let (words, _) = map.as_chunks::<4>();
    let mut words = words.iter().map(|word| u32::from_le_bytes(*word));
    let (magic, count) = (words.next()?, words.next()?);
    let mut pairs = std::iter::from_fn(|| Some((words.next()?, words.next()?))).take(count as usize);
    (magic == RELATION_MAP_MAGIC).then(|| pairs.find(|(oid, _)| *oid == catalogue))?.map(|(_, file)| file)
}

/// Disables all subscriptions and stops the compute, after which a quorum holds that they are. Returns how many were enabled.
pub async fn disable(compute: Compute) -> Result<u64, StartError> {
    let disabled = update(&compute).await.map_err(|error| {
        let message = error.as_db_error().map(|error| error.message().to_owned());
        StartError::Subscriptions(message.unwrap_or_else(|| error.to_string()))
    })?;
    stop::stop(compute).await.map_err(|error| StartError::Subscriptions(error.to_string()))?;
    tracing::info!(disabled, "subscriptions of the ancestor are disabled");
    Ok(disabled)
}

/// Of all databases at once, and without the event triggers and databases closed to connections that `ALTER SUBSCRIPTION` would meet.
async fn update(compute: &Compute) -> Result<u64, tokio_postgres::Error> {
    let client = connect(compute.dir.root(), ADMIN_DATABASE, "dormouse_subscriptions").await?;
    client.batch_execute(SESSION).await?;
    client.execute(DISABLE, &[]).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(magic: u32, pairs: &[(u32, u32)]) -> Vec<u8> {
        let words = [magic, pairs.len() as u32].into_iter().chain(pairs.iter().flat_map(|(oid, file)| [*oid, *file]));
        let mut bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
        bytes.resize(512, 0);
        bytes
    }

    #[test]
    fn the_map_tells_where_a_catalogue_is() {
        let pairs = [(1262, 1262), (PG_SUBSCRIPTION, 16_500)];
        assert_eq!(mapped(&map(RELATION_MAP_MAGIC, &pairs), PG_SUBSCRIPTION), Some(16_500));
        assert_eq!(mapped(&map(RELATION_MAP_MAGIC, &pairs), 1260), None);
        assert_eq!(mapped(&map(RELATION_MAP_MAGIC, &pairs[..1]), PG_SUBSCRIPTION), None);
        assert_eq!(mapped(&map(7, &pairs), PG_SUBSCRIPTION), None);
        assert_eq!(mapped(&[], PG_SUBSCRIPTION), None);
    }
}
