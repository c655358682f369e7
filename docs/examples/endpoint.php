<?php
// A complete SessionExpired endpoint of an operator (v4). Put nginx (see nginx.conf) or another TLS proxy in front.
// TOKEN_FILE has the agreed token. ENDED_DIR is a directory for this script alone: one file for each ended session.
//   TOKEN_FILE=partner.token ENDED_DIR=ended PHP_CLI_SERVER_WORKERS=4 php -S 127.0.0.1:8081 endpoint.php

const PROVIDER = 'luckymonaco', FIELDS = ['providerId', 'sessionId', 'externalPlayerId', 'token'];

function answer(int $code, string $text, int $status = 200): never
{
    http_response_code($status);
    header('Content-Type: application/json');
    exit(json_encode(['error' => $code, 'description' => $text]));
}

if (!is_readable((string) getenv('TOKEN_FILE')) || !is_dir((string) getenv('ENDED_DIR'))) {
    error_log('endpoint.php: TOKEN_FILE must name a file, and ENDED_DIR a directory');
    answer(100, 'Not configured');
}
if ($_SERVER['REQUEST_METHOD'] !== 'POST') {
    header('Allow: POST');
    answer(7, 'Method not allowed', 405);
}
if (strtolower(trim(explode(';', $_SERVER['CONTENT_TYPE'] ?? '')[0])) !== 'application/json') {
    answer(7, 'Not JSON', 415);
}
$body = file_get_contents('php://input');
$notice = json_decode($body, true);
if (!is_array($notice) || preg_match_all('/"sessionId"\s*:/', $body) !== 1) {
    answer(7, 'Bad parameters');
}
foreach (FIELDS as $name) {
    if (!is_string($notice[$name] ?? null) || $notice[$name] === '') {
        answer(7, 'Bad parameters');
    }
}
$token = trim(file_get_contents(getenv('TOKEN_FILE')));
if (strtolower($notice['providerId']) !== PROVIDER || !hash_equals($token, $notice['token'])) {
    answer(7, 'Bad provider or token');
}
// The file is written whole and then linked. Of ten equal notices at the same moment, one creates it and all read it.
$file = getenv('ENDED_DIR') . '/' . hash('sha256', $notice['sessionId']);
$mine = tempnam(getenv('ENDED_DIR'), 'new');
file_put_contents($mine, $notice['externalPlayerId']);
@link($mine, $file);
unlink($mine);
file_get_contents($file) === $notice['externalPlayerId'] ? answer(0, 'Success') : answer(7, 'Another player');
