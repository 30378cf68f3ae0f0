//! Things by id or by name.

use anyhow::{bail, ensure};
use control_plane_api::v2::{Branch, BranchList, Endpoint, EndpointList, Project, ProjectList};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use types::ProjectId;

use super::{Api, ProjectChoice};

/// As large as the API allows.
const PAGE: usize = 1000;
/// A bound against an API that never ends.
const MAX_PAGES: usize = 1000;

/// A text as one segment of a path.
pub fn segment(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

/// All projects.
pub async fn projects(api: &Api) -> anyhow::Result<Vec<Project>> {
    let (mut all, mut cursor) = (Vec::new(), String::new());
    for _ in 0..MAX_PAGES {
        let page: ProjectList = api.get(&format!("/projects?limit={PAGE}&cursor={}", segment(&cursor))).await?;
        all.extend(page.projects);
        match page.pagination {
            Some(next) => cursor = next.cursor,
            None => return Ok(all),
        }
    }
    bail!("the API's list of projects does not end")
}

/// The project that was named, or the only one.
pub async fn project(api: &Api, choice: &ProjectChoice) -> anyhow::Result<Project> {
    let mut all = projects(api).await?;
    match &choice.project {
        Some(asked) => {
            let by_id = all.iter().position(|p| p.id.as_str() == asked);
            let by_name = || all.iter().position(|p| p.name == *asked);
            let same_name = all.iter().filter(|p| p.name == *asked).count();
            ensure!(by_id.is_some() || same_name < 2, "{same_name} projects are called {asked:?}; give an id");
            match by_id.or_else(by_name) {
                Some(index) => Ok(all.swap_remove(index)),
                None => bail!("there is no project {asked:?}; see `dormouse projects list`"),
            }
        }
        None if all.len() == 1 => Ok(all.swap_remove(0)),
        None if all.is_empty() => bail!("there is no project yet; make one with `dormouse projects create`"),
        None => bail!("there are {} projects; choose one with --project (see `dormouse projects list`)", all.len()),
    }
}

/// All branches of a project.
pub async fn branches(api: &Api, project: &ProjectId) -> anyhow::Result<Vec<Branch>> {
    let (mut all, mut cursor) = (Vec::new(), String::new());
    for _ in 0..MAX_PAGES {
        let path = format!("/projects/{project}/branches?limit={PAGE}&cursor={}", segment(&cursor));
        let page: BranchList = api.get(&path).await?;
        all.extend(page.branches);
        match page.pagination {
            Some(next) => cursor = next.cursor,
            None => return Ok(all),
        }
    }
    bail!("the API's list of branches does not end")
}

/// The branch that was named, or the project's default branch.
pub async fn branch(api: &Api, project: &Project, asked: Option<&str>) -> anyhow::Result<Branch> {
    let all = branches(api, &project.id).await?;
    let found = match asked {
        Some(asked) => {
            all.iter().find(|b| b.id.as_str() == asked).or_else(|| all.iter().find(|b| b.name == asked)).cloned()
        }
        None => all.iter().find(|b| b.default).cloned(),
    };
    match (found, asked) {
        (Some(branch), _) => Ok(branch),
        (None, Some(asked)) => bail!("project {} has no branch {asked:?}; see `dormouse branches list`", project.name),
        (None, None) => bail!("project {} has no default branch", project.name),
    }
}

/// All endpoints of a project.
pub async fn endpoints(api: &Api, project: &ProjectId) -> anyhow::Result<Vec<Endpoint>> {
    Ok(api.get::<EndpointList>(&format!("/projects/{project}/endpoints")).await?.endpoints)
}

/// The endpoint that was named, by its id or its branch.
pub async fn endpoint(api: &Api, project: &Project, asked: &str) -> anyhow::Result<Endpoint> {
    let all = endpoints(api, &project.id).await?;
    if let Some(found) = all.iter().find(|e| e.id.as_str() == asked || e.name.as_deref() == Some(asked)) {
        return Ok(found.clone());
    }
    let branch = branch(api, project, Some(asked)).await?;
    match all.into_iter().find(|e| e.branch_id == branch.id) {
        Some(found) => Ok(found),
        None => bail!("branch {asked} has no endpoint; make one with `dormouse endpoints create {asked}`"),
    }
}
